"""megatron-vlm: packed vision-language training on megatron-core, every layout shown equal to one process."""

__version__ = "0.1.0"
