"""The model: tower, projector and language model, in any layout."""

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
