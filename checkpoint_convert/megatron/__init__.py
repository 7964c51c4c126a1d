"""Megatron checkpoints as named tensors: read, written and loaded without process groups.

Nothing here knows Hugging Face folders; `mapping` translates the tensor names.
"""

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)
