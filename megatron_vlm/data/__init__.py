"""From annotations and images to packed rows: sources, shards, length index, mixture, packing and loader.

Modules here run on a CPU without megatron-core. They must not import the model, training or process groups.
"""
