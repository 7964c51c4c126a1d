"""The training loop: trainer, step, optimizer, checkpoints and metrics.

Model code belongs to `model` and data code to `data`; nothing here knows Hugging Face names or files.
"""

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
