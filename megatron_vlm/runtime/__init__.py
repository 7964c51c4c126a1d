"""What a process of a run needs: device, process groups, launch, logging, atomic files, preparation for megatron-core.

Nothing here may import the model, the data, training or conversion; only `megatron_vlm.config` is below it.
"""
