"""Estimates of work, memory and communication of a recipe, and choices that follow from them.

Nothing here imports torch or megatron-core: a plan for a cluster is made on any machine.
"""
