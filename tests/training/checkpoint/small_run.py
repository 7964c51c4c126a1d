"""A model in a parallel layout that trains, saves and loads, for tests on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import tensor_parallel

from megatron_vlm.config import Recipe
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.runtime.process_groups import initialize_groups, parallel_ranks, tile_shard_rank
from megatron_vlm.training.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss, rows_for_chunks
from tests.parallel.layouts import Layout
from tests.parallel.rows import rows_of, tiny_recipe


class Run:
    """A model in a layout, trained on the rows of the layout tests."""

    def __init__(self, layout: Layout, folder: Path, **parallel: Any) -> None:
        trainable = list(layout.trainable)
        recipe = tiny_recipe(layout.parallel(), layout.family, optimizer="adam", trainable=trainable, lora_r=6)
        self.recipe: Recipe = recipe
        recipe.training.save = str(folder)
        for name, value in parallel.items():
            setattr(recipe.parallel, name, value)
        initialize_groups(recipe.parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = build_model(recipe)
        initialize_weights(chunks, recipe)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.schedule = build_schedule(self.optimizer, recipe)
        ranks = parallel_ranks()
        tiles = tile_shard_rank(recipe.parallel) if ranks.is_first_stage else None
        rows = rows_of(ranks.data, ranks.data_size, tiles)
        self._per_step = recipe.training.global_batch_size // ranks.data_size
        self._rows = rows
        self.rows = rows_for_chunks(rows, len(self.chunks))

    def skip(self, steps: int) -> None:
        for _ in range(steps * self._per_step):
            next(self._rows)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss, _ = global_loss(forward_backward(self.chunks, self.rows, self.recipe))
            update(self.optimizer)
            self.schedule.step(increment=1)
            losses.append(loss)
        return losses

    def save(self, iteration: int) -> Path:
        progress = Progress(iteration=iteration)
        return Path(str(save_checkpoint(self.chunks, self.recipe, progress, self.optimizer, self.schedule)))

    def load(self) -> Progress:
        checkpoint = latest_checkpoint(self.recipe.training.save or "")
        assert checkpoint is not None
        return load_checkpoint(checkpoint, self.chunks, self.recipe, optimizer=self.optimizer, schedule=self.schedule)


def weights_of(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]


def furthest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def overlaps(checkpoint: Path) -> list[str]:
    """Tensors whose chunks do not cover every value exactly once."""
    wrong = []
    for key, stored in read_metadata(checkpoint).state_dict_metadata.items():
        if hasattr(stored, "chunks"):
            counts = torch.zeros(stored.size, dtype=torch.int)
            for chunk in stored.chunks:
                box = zip(chunk.offsets, chunk.sizes, strict=True)
                counts[tuple(slice(start, start + size) for start, size in box)] += 1
            if not bool((counts == 1).all()):
                wrong.append(key)
    return wrong
