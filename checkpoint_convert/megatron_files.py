"""Megatron checkpoints as plain tensors: one unsharded model is built, filled or read, and saved or loaded.

The distributed format then loads in any layout, so that conversion never has to know one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import megatron_vlm.runtime  # noqa: F401  (prepares the process before megatron.core is imported)
from checkpoint_convert.errors import ConversionError
from megatron_vlm.config import ParallelConfig, Recipe
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import (
    CheckpointError,
    Progress,
    load_checkpoint,
    read_recipe,
    require_checkpoint,
    save_checkpoint,
)


def tensors_of(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The tensors of a model of one stage and one tensor rank, under the name map's Megatron names."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state")
    }


def fill(model: VisionLanguageModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy tensors into the model and return their names; a name that the model lacks is a KeyError."""
    into = tensors_of(model)
    names = set()
    with torch.no_grad():
        for name, tensor in tensors:
            into[name].copy_(tensor)
            names.add(name)
    return names


def write_checkpoint(
    folder: Path, recipe: Recipe, tensors: Iterable[tuple[str, torch.Tensor]], tokenizer_fingerprint: str
) -> list[str]:
    """Save a checkpoint of iteration 0 that holds `tensors`; return the names of those that were drawn instead."""
    with distributed(recipe.parallel, seed=recipe.training.seed):
        (model,) = chunks = build_model(recipe)
        initialize_weights(chunks, recipe)
        filled = fill(model, tensors)
        save_checkpoint(folder, chunks, recipe, Progress(tokenizer_fingerprint=tokenizer_fingerprint))
        return sorted(set(tensors_of(model)) - filled)


def checkpoint_recipe(folder: Path) -> Recipe:
    """The recipe of a checkpoint, laid out for one process. Raises ConversionError where there is no checkpoint."""
    try:
        recipe = read_recipe(folder)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    recipe.parallel = ParallelConfig()
    return recipe


@contextmanager
def loaded_model(folder: Path) -> Iterator[VisionLanguageModel]:
    """The model of the newest checkpoint in `folder`, whole, for the time of the block."""
    recipe = checkpoint_recipe(folder)
    with distributed(recipe.parallel):
        chunks = build_model(recipe)
        load_checkpoint(require_checkpoint(folder), chunks, recipe)
        yield chunks[0].eval()
