"""The parts of a training step: forward and backward in megatron-core's pipeline schedule, and the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_vlm.config import Recipe
from megatron_vlm.data.rows.rank_batch import AnyBatch, RankBatch
from megatron_vlm.model.sharding import unwrap
from megatron_vlm.runtime.device import current_device


class _StepWeight:
    """Sums the token weights of a step, by which its gradients are divided.

    megatron-core's schedule sums what the loss function returns as integers, but weights are not integers. So it is
    given nothing to count, and this class divides.
    """

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.double, device=current_device())

    def loss(self, row: RankBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """megatron-core's 3-tuple: weighted sum of losses of this context slice, nothing to count, and report."""
        # Filled on the device: a copy from the host would wait for it.
        weight, count = (
            torch.full((), value, dtype=torch.double, device=output.device)
            for value in (row.loss_weight, row.num_supervised)
        )
        self.total += weight
        report = torch.stack([output.detach().double(), weight, count])
        return output, torch.zeros((), dtype=torch.int), {"loss": report}

    def forward(self, rows: Iterator[AnyBatch], model: Any) -> tuple[torch.Tensor, Any]:
        row = unwrap(model).on_device(next(rows))
        return model(row), partial(self.loss, row)

    def finalize(self, chunks: list[Any], _: torch.Tensor, **more: Any) -> None:
        """Reduce the gradients and divide them by the sum of all ranks, without waiting for the device."""
        finalize_model_grads(chunks, None, **more)
        last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(self.total, last_stage, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(self.total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        factor = torch.where(self.total > 0, 1 / self.total, 1.0).float()  # with fp64 the product is slower
        for chunk in chunks:
            chunk.scale_gradients(factor)


def rows_for_chunks(rows: Iterator[AnyBatch], chunks: int) -> list[Iterator[AnyBatch]]:
    """One iterator per model chunk (virtual stage) over the same rows, each of which is read once.

    A row is kept until the last chunk has taken it, and no longer: itertools.tee keeps the last 57, with their tiles.
    """
    waiting: list[deque[AnyBatch]] = [deque() for _ in range(chunks)]

    def take(mine: deque[AnyBatch]) -> Iterator[AnyBatch]:
        while True:
            if not mine:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                for queue in waiting:
                    queue.append(row)
                del row
            yield mine.popleft()

    return [take(mine) for mine in waiting]


def forward_backward(
    chunks: list[DistributedDataParallel],
    rows: list[Iterator[AnyBatch]],
    recipe: Recipe,
    *,
    rows_per_step: int | None = None,
    forward_only: bool = False,
) -> torch.Tensor:
    """Run the step's rows through this rank's chunks; the gradient buffers then hold the reduced gradients.

    Args:
        chunks: the model chunks of this rank.
        rows: from `rows_for_chunks`.
        recipe: its global_batch_size and seq_length are used.
        rows_per_step: rows over all data-parallel ranks; default: global_batch_size.
        forward_only: compute the loss only.

    Returns:
        fp64 [weighted sum of losses, sum of weights, number of supervised tokens] over the rows of this data rank and
        this context slice, on the last stage; zeros on the other stages. Gradients are those of the weighted mean over
        the step's supervised tokens.
    """
    rows_per_step = rows_per_step or recipe.training.global_batch_size
    micro_batches = rows_per_step // parallel_state.get_data_parallel_world_size()
    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    several, weight = len(chunks) > 1, _StepWeight()
    get_model_config(chunks[0]).finalize_model_grads_func = weight.finalize
    reports = get_forward_backward_func()(
        forward_step_func=weight.forward,
        data_iterator=rows if several else rows[0],
        model=chunks if several else chunks[0],
        num_microbatches=micro_batches,
        seq_length=recipe.data.seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    totals = [report["loss"] for report in reports]
    return torch.stack(totals).sum(0) if totals else torch.zeros(3, dtype=torch.double, device=current_device())


def global_loss(totals: torch.Tensor) -> tuple[float, int]:
    """(weighted mean loss over the supervised tokens of the whole step, their number), the same on every rank.

    `totals` are those of forward_backward.
    """
    return mean_loss(sum_over_ranks(totals))


def mean_loss(summed: torch.Tensor) -> tuple[float, int]:
    """As global_loss, from sums over ranks. The host waits for the device here, and not in sum_over_ranks."""
    loss, weight, count = summed.tolist()
    return loss / weight if weight else 0.0, int(count)


def sum_over_ranks(totals: torch.Tensor) -> torch.Tensor:
    """Sums of the last stages' totals over data and context ranks, on every rank of the world."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        totals = torch.zeros_like(totals)  # tensor ranks hold the same loss: count it once
    totals = totals.to(current_device())
    dist.all_reduce(totals)
    return totals
