"""A recipe's dataset and the plan of its rows: what a loader, a dry run or a check of the order starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_vlm.data.dataset import MixtureDataset, open_dataset, open_plan_cache
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.plan_fingerprint import plan_inputs

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe


@dataclass
class PlannedData:
    """The dataset, and all rows of a run over it."""

    dataset: MixtureDataset
    plan: RowPlan
    inputs: dict[str, Any]
    """What determines the order of rows, see `plan_fingerprint.py`."""


def plan_data(recipe: Recipe, *, is_logging_rank: bool, plan_ahead: bool = False) -> PlannedData:
    """Open the dataset of a recipe and plan its first epoch, or read both from the cache.

    Args:
        recipe: its data, model and training.seed are used.
        is_logging_rank: log which samples are rejected, skipped and truncated. True in one process of a run.
        plan_ahead: plan each next epoch in a helper process. One rank per machine should do so.

    Raises:
        DataError: something cannot be opened, no sample is usable, or a sample is longer than a row and
            oversized_samples is `error`.
    """
    dataset = open_dataset(recipe, is_logging_rank)
    inputs = plan_inputs(recipe, dataset)
    plans = open_plan_cache(recipe, dataset, inputs)
    if plan_ahead and recipe.data.num_workers:
        plans.plan_ahead()
    return PlannedData(dataset, RowPlan(plans), inputs)
