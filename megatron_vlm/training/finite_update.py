"""An update of the weights that is not applied when the loss or the gradient is NaN or infinite.

bf16 and fp32 need no loss scaling, so megatron-core does not look: one NaN gradient would make every weight NaN, and
the next checkpoint would save them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.training.run_files import run_folder
from megatron_vlm.training.sample_report import append_record, describe_samples, gather_samples
from megatron_vlm.training.step import mean_loss

SKIPPED_FILE = "skipped_updates.jsonl"


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is NaN or infinite."""


def update(optimizer: MegatronOptimizer, loss: float | Callable[[], float] = 0.0) -> tuple[bool, float]:
    """Clip and step. Weights and optimizer state stay as they are if the gradient norm or `loss` is not finite.

    Both are the same on every rank, so all ranks decide alike.

    Args:
        optimizer: of the model.
        loss: of the step. A function is called after the norm was read: the host then waits for the device once.

    Returns:
        Whether the weights were updated, and the gradient norm before clipping.
    """
    norm = math.nan
    measure, apply = optimizer.get_grad_norm, optimizer.step_with_ready_grads

    def get_grad_norm() -> Any:
        nonlocal norm
        measured = measure()
        norm = float(measured)
        return measured

    def step_with_ready_grads() -> bool:
        finite = math.isfinite(norm) and math.isfinite(loss() if callable(loss) else loss)
        return bool(finite and apply())

    # Between these two calls of its step, megatron-core clips; nothing else of the step needs repeating here.
    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
    try:
        updated, _, _ = optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads
    # Clearing the buffers is not enough: an fp32 optimizer leaves each parameter's grad as an alias of its buffer, and
    # the next backward would then count its first micro-batch twice.
    optimizer.zero_grad()
    return bool(updated), norm


def update_and_loss(optimizer: MegatronOptimizer, totals: torch.Tensor) -> tuple[bool, float, float, int]:
    """`update` with the loss of `totals`, which are read after the norm, so that the host waits for the device once.

    Args:
        optimizer: of the model.
        totals: of the step, from sum_over_ranks.

    Returns:
        Whether the weights were updated, the gradient norm before clipping, the loss, and the supervised tokens.
    """
    read = functools.cache(lambda: mean_loss(totals))
    updated, norm = update(optimizer, lambda: read()[0])
    return updated, norm, *read()


class SkippedUpdates:
    """Reports updates that were not applied, and ends the run after too many of them in a row."""

    def __init__(self, recipe: Recipe) -> None:
        self.limit, self.folder = recipe.training.max_skipped_updates, run_folder(recipe)
        self.in_a_row = 0

    def applied(self) -> None:
        self.in_a_row = 0

    def skipped(self, iteration: int, loss: float, grad_norm: float, sample_ids: list[str]) -> None:
        """Every rank calls this after an update that was not applied.

        Args:
            iteration: number of the iteration, from 1.
            loss: of the whole step.
            grad_norm: of the whole model.
            sample_ids: of the rows that this rank counts in this step; those of all ranks are reported.

        Raises:
            NonFiniteError: this was the last of `max_skipped_updates` in a row.
        """
        self.in_a_row += 1
        samples = gather_samples(sample_ids)
        log_rank0(
            f"WARNING: iteration {iteration} was not applied: loss {loss}, gradient norm {grad_norm} "
            f"({self.in_a_row} in a row, {self.limit} end the run). {describe_samples(samples)}"
        )
        where = ""
        if self.folder is not None:
            where = f"; {self.folder / SKIPPED_FILE} lists their samples"
            record = {"iteration": iteration, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples}
            append_record(self.folder / SKIPPED_FILE, record)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{self.in_a_row} updates in a row, up to iteration {iteration}, had a loss or a gradient that is NaN "
                f"or infinite (loss {loss}, gradient norm {grad_norm}){where}. The weights are those of before. Lower "
                "training.lr, look at the samples, or start again from an older checkpoint with another training.seed"
            )
