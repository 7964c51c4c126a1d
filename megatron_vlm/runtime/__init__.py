"""Devices, process groups, launch, logging and files: what a process of a run stands on.

Nothing here knows the model, the data or the training loop. Modules that use megatron-core import `megatron_patches`
first; the others work without it.
"""
