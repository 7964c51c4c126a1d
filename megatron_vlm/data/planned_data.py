"""A recipe's dataset and the plan of its rows: what a loader, a dry run or a check of the order starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_vlm.data.dataset import MixtureDataset, open_dataset, open_plan_cache
from megatron_vlm.data.held_out import hold_out
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
    held_out: MixtureDataset | None = None
    """The samples that data.valid_share keeps out of training, if it does."""


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
    dataset, held_out = open_dataset(recipe, is_logging_rank), None
    if recipe.data.valid_share:
        dataset, held_out = hold_out(dataset, recipe.data.valid_share)
    return plan_dataset(recipe, dataset, plan_ahead=plan_ahead, held_out=held_out)


def plan_dataset(
    recipe: Recipe, dataset: MixtureDataset, *, plan_ahead: bool = False, held_out: MixtureDataset | None = None
) -> PlannedData:
    """Plan the first epoch of an open dataset, or read it from the cache; arguments as in plan_data."""
    inputs = plan_inputs(recipe, dataset)
    plans = open_plan_cache(recipe, dataset, inputs)
    if plan_ahead and recipe.data.num_workers:
        plans.plan_ahead()
    return PlannedData(dataset, RowPlan(plans), inputs, held_out)
