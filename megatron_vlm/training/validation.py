"""Evaluation on validation data: the loss of all of it and of each dataset, the same in every parallel layout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.data.planned_data import PlannedData
from megatron_vlm.data.rows.rank_batch import AnyBatch, RankBatch
from megatron_vlm.data.validation import ValidationRows
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.model.sharding import unwrap
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.process_groups import ParallelRanks, tile_shard_rank
from megatron_vlm.training.optimizer import synchronize_parameters
from megatron_vlm.training.step import rows_for_chunks, sum_over_ranks

LOSS = "eval_loss"


def dataset_losses(
    chunks: list[DistributedDataParallel],
    rows: list[Iterator[AnyBatch]],
    recipe: Recipe,
    micro_batches: int,
    datasets: int,
) -> torch.Tensor:
    """Run rows through the model without gradients. Every rank calls this; weights must be synchronised.

    Args:
        chunks: the model chunks of this rank.
        rows: from `rows_for_chunks`; RankBatches that were made with a view by dataset.
        recipe: its seq_length is used.
        micro_batches: rows of each data-parallel rank.
        datasets: number of datasets.

    Returns:
        [datasets, 3] fp64 on every rank: weighted sum of losses, sum of weights, number of supervised tokens of all
        ranks' rows.
    """
    totals = torch.zeros(datasets, 3, dtype=torch.double, device=current_device())

    def add(row: RankBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        assert row.token_datasets is not None
        ones = torch.ones_like(losses, dtype=torch.double)
        weights = ones if row.token_weights is None else row.token_weights.double()
        totals.index_add_(0, row.token_datasets, torch.stack([losses * weights, weights, ones], dim=1))
        return losses.sum(), torch.zeros((), dtype=torch.int), {}

    def forward(rows: Iterator[AnyBatch], model: Any) -> tuple[torch.Tensor, Any]:
        row = unwrap(model).on_device(next(rows))
        return model(row, token_losses=True), partial(add, row)

    several = len(chunks) > 1
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=rows if several else rows[0],
            model=chunks if several else chunks[0],
            num_microbatches=micro_batches,
            seq_length=recipe.data.seq_length,
            micro_batch_size=1,
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()
    return sum_over_ranks(totals)


class Validator:
    """Evaluates the model of a run on its validation data."""

    def __init__(self, recipe: Recipe, planned: PlannedData, ranks: ParallelRanks) -> None:
        """
        Args:
            recipe: of the run.
            planned: the validation data.
            ranks: of this process.

        Raises:
            ConfigError: best_metric is none that an evaluation has.
        """
        self.recipe, parallel = recipe, recipe.parallel
        chunks = parallel.virtual_pipeline_model_parallel_size
        self._ranks = ranks
        self.rows = ValidationRows(
            recipe,
            planned,
            dp_rank=ranks.data,
            dp_size=ranks.data_size,
            multiple=ranks.data_size * (parallel.pipeline_model_parallel_size if chunks > 1 else 1),
            tile_shard=tile_shard_rank(parallel) if ranks.is_first_stage else None,
            view=rank_view(recipe),
        )
        self._iterators = rows_for_chunks(iter(self.rows), chunks)
        best, known = recipe.training.best_metric, [LOSS, *(f"{LOSS}/{name}" for name in self.rows.datasets)]
        if best is not None and best not in known:
            raise ConfigError(f"training.best_metric = {best}: no such metric. Choose from {', '.join(known)}.")

    def is_due(self, iteration: int) -> bool:
        """Whether to evaluate after this iteration."""
        training = self.recipe.training
        return iteration % (training.eval_interval or training.save_interval) == 0 or iteration == training.train_iters

    def run(self, chunks: list[DistributedDataParallel]) -> dict[str, float]:
        """Evaluate; every rank calls this, and gets the same.

        Returns:
            eval_loss over all data, eval_loss/NAME of each dataset with supervised tokens, eval_loss_tokens, and
            eval_seconds.
        """
        started = time.perf_counter()
        synchronize_parameters(chunks)
        per_rank = self.rows.num_rows // self._ranks.data_size
        sums = dataset_losses(chunks, self._iterators, self.recipe, per_rank, len(self.rows.datasets))
        total = sums.sum(0).tolist()
        values = {LOSS: total[0] / total[1] if total[1] else 0.0}
        for name, (loss, weight, _) in zip(self.rows.datasets, sums.tolist(), strict=True):
            if weight and len(self.rows.datasets) > 1:
                values[f"{LOSS}/{name}"] = loss / weight
        return {**values, "eval_loss_tokens": int(total[2]), "eval_seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Stop the workers."""
        self.rows.loader.close()
