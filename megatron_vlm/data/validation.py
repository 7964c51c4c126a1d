"""Validation data: a mixture of its own, or a share of the training data; and the rows that an evaluation runs.

Every evaluation runs the same rows. They do not depend on the parallel layout: where their number is not a multiple of
what the ranks need, rows without supervised tokens are added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from megatron_vlm.data.dataset import open_dataset
from megatron_vlm.data.loader import RowLoader, load_rows
from megatron_vlm.data.packing.row_plan import PlannedRow, RowPlan
from megatron_vlm.data.planned_data import PlannedData, plan_dataset
from megatron_vlm.data.rows.rank_batch import RankBatch, RankView

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe


def open_validation(recipe: Recipe, training: PlannedData, is_logging_rank: bool) -> PlannedData | None:
    """The validation data of a recipe, planned; None where it has none.

    Args:
        recipe: its data.valid_data_path and data.valid_share are used, and what training data is read with.
        training: the training data of the recipe.
        is_logging_rank: log which samples are rejected, skipped and truncated.

    Raises:
        DataError: as plan_data.
    """
    data = recipe.data
    if data.valid_data_path:
        other = replace(recipe, data=replace(data, data_path=data.valid_data_path, valid_share=0.0))
        return plan_dataset(other, open_dataset(other, is_logging_rank))
    if training.held_out is None:
        return None
    return plan_dataset(recipe, training.held_out)


class ValidationRows:
    """The rows of evaluations that this rank runs, read ahead by workers of their own."""

    def __init__(
        self, recipe: Recipe, planned: PlannedData, *, dp_rank: int, dp_size: int, multiple: int,
        tile_shard: tuple[int, int] | None, view: RankView,
    ) -> None:  # fmt: skip
        """
        Args:
            recipe: its training.eval_iters and global_batch_size say how many rows an evaluation has.
            planned: the validation data.
            dp_rank: data-parallel rank.
            dp_size: data-parallel size.
            multiple: rows of an evaluation are a multiple of this, which is a multiple of dp_size.
            tile_shard: (rank, size) among the ranks that encode a row's tiles; None: this rank decodes no image.
            view: the part of each row that this rank computes with.
        """
        training = recipe.training
        limit = None if training.eval_iters is None else training.eval_iters * training.global_batch_size
        chosen = choose_rows(planned.plan, limit)
        self.supervised_rows, self.num_rows = len(chosen), multiple * math.ceil(len(chosen) / multiple)
        """Rows with data, and rows that all ranks together run."""
        self.datasets = short_names([source.name for source in planned.dataset.mixture.sources.sources])
        filler = [replace(chosen[0], row_index=index) for index in range(len(chosen), self.num_rows)]
        own = [*chosen, *filler][dp_rank::dp_size]
        self.loader: RowLoader = load_rows(
            recipe, planned, itertools.cycle(own), tile_shard, replace(view, by_dataset=True)
        )

    def __iter__(self) -> Iterator[RankBatch]:
        """Without end: the rows of one evaluation after the other."""
        for batch in self.loader:
            if batch.row_index >= self.supervised_rows and batch.supervised is not None:
                for name in ("supervised", "targets", "token_datasets", "token_weights"):
                    tensor = getattr(batch, name)
                    setattr(batch, name, None if tensor is None else tensor[:0])
                batch.num_supervised, batch.loss_weight = 0, 0.0
            yield batch


def choose_rows(plan: RowPlan, limit: int | None) -> list[PlannedRow]:
    """All rows of the first epoch, or `limit` of them at equal distances; numbered from 0."""
    number = plan.rows if limit is None else min(limit, plan.rows)
    indices = [index * plan.rows // number for index in range(number)]
    return [replace(plan.row(row), row_index=index) for index, row in enumerate(indices)]


def short_names(paths: Sequence[str]) -> list[str]:
    """A name for each file or folder: its last part without suffix, or as many parts as keep them different."""
    parts = [PurePosixPath(path).with_suffix("").parts for path in paths]
    names = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        repeated = {name for name in names if names.count(name) > 1}
        names = ["/".join(part[-depth:]) if name in repeated else name for name, part in zip(names, parts, strict=True)]
    return names
