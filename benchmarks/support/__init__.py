"""What the benchmarks share: samples, random models, the peers' algorithms, own processes, tables and JSON files.

Nothing here is a command; a benchmark is a module of `benchmarks` itself.
"""
