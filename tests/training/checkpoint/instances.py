"""Several instances of the distributed optimizer: the same training and the same checkpoint as with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training.checkpoint.shards import chained
from megatron_vlm.training.metrics.grad_norms import part_squares
from megatron_vlm.training.step import forward_backward
from tests.parallel.layouts import Layout
from tests.training.checkpoint.small_run import Run, overlaps

TWO = {"num_distributed_optimizer_instances": 2}


def _part_norms(run: Run) -> list[float]:
    """Of the gradients of one more step, whose update is not made."""
    forward_backward(run.chunks, run.rows, run.recipe)
    squares = part_squares(run.chunks)
    dist.all_reduce(squares)
    return squares.sqrt().tolist()  # type: ignore[no-any-return]


def _state_size(run: Run) -> int:
    """Parameters whose optimizer state is on this rank."""
    members = chained(run.optimizer)
    return sum(state["exp_avg"].numel() for member in members for state in member.optimizer.state.values())


def two_instances_of_the_optimizer(folder: Path) -> dict[str, Any]:
    """Four data ranks as two instances of two; loaded as one instance, in another layout, and as two again."""
    run = Run(Layout(), folder / "one")
    expected = run.train(3)
    norms, state = _part_norms(run), _state_size(run)
    destroy_groups()
    run = Run(Layout(), folder / "two", **TWO)
    losses = run.train(2)
    checkpoint = run.save(2)
    losses += run.train(1)
    state_ratio = _state_size(run) / state
    norm_ratios = [a / b for a, b in zip(_part_norms(run), norms, strict=True)]
    destroy_groups()
    again = {}
    for name, layout, parallel in (("tp2", Layout(tp=2), {}), ("cp2", Layout(cp=2), TWO), ("pp2", Layout(pp=2), TWO)):
        run = Run(layout, folder / "two", **parallel)
        run.load()
        run.skip(2)
        again[name] = run.train(1)[0] / expected[2] - 1
        destroy_groups()
    return {
        "losses": [a / b - 1 for a, b in zip(losses, expected, strict=True)],
        "norms": norm_ratios,
        "state": state_ratio,
        "sizes": [path.stat().st_size for path in sorted(checkpoint.glob("*.distcp"))],
        "overlapping": overlaps(checkpoint),
        "again": again,
    }
