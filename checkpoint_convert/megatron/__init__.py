"""Megatron checkpoints as named tensors: read, written and loaded without process groups.

Knows nothing of Hugging Face folders; `mapping` translates the names.
"""

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)
