"""The model: vision tower, projector, language model and loss, sharded for any parallel layout.

The training loop, checkpoint files and text generation are not here: those packages import this one, never the reverse.
"""

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
