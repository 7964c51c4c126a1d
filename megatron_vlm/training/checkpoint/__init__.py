"""Checkpoints in megatron-core's distributed format: written by all ranks in one layout, read in any.

This package knows nothing of the training loop, and nothing of Hugging Face folders.
"""

from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import (
    RECIPE,
    TRACKER,
    iteration_of,
    latest_checkpoint,
    read_recipe,
    require_checkpoint,
)
from megatron_vlm.training.checkpoint.load import (
    check_fits,
    load_checkpoint,
    load_common,
    read_progress,
    recipe_differences,
    require_same_model,
    require_same_tokenizer,
)
from megatron_vlm.training.checkpoint.progress import Progress
from megatron_vlm.training.checkpoint.resume import checkpoint_to_resume, choose_checkpoint, naming
from megatron_vlm.training.checkpoint.save import Checkpointer, save_checkpoint
from megatron_vlm.training.checkpoint.trusted_metadata import read_metadata

__all__ = [
    "RECIPE",
    "TRACKER",
    "CheckpointError",
    "Checkpointer",
    "Progress",
    "check_fits",
    "checkpoint_to_resume",
    "choose_checkpoint",
    "iteration_of",
    "latest_checkpoint",
    "load_checkpoint",
    "load_common",
    "naming",
    "read_metadata",
    "read_progress",
    "read_recipe",
    "recipe_differences",
    "require_checkpoint",
    "require_same_model",
    "require_same_tokenizer",
    "save_checkpoint",
]
