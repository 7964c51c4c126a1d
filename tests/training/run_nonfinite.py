"""One NaN or infinity in one rank's gradient, or in the loss, in several layouts of two ranks; results as JSON.

torchrun --nproc-per-node 2 -m tests.training.run_nonfinite FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training.finite_update import SKIPPED_FILE, NonFiniteError, SkippedUpdates, update
from megatron_vlm.training.optimizer import synchronize_parameters
from megatron_vlm.training.step import forward_backward, global_loss
from tests.parallel.layouts import Layout
from tests.training.checkpoint.small_run import Run

CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "dp2": (Layout(), {}),
    "dp2 whole optimizer on every rank": (Layout(), {"use_distributed_optimizer": False}),
    "dp2 overlap": (
        Layout(), {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
    ),
    "tp2": (Layout(tp=2), {}),
    "pp2": (Layout(pp=2), {}),
}  # fmt: skip


def _state(run: Run) -> list[torch.Tensor]:
    """Weights and optimizer state of this rank."""
    synchronize_parameters(run.chunks)
    weights = [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]
    states = [state for part in run.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    kept = [value for state in states for value in state.values()]
    return weights + [value.clone() for value in kept if isinstance(value, torch.Tensor)]


def _step(run: Run, planted: float | None, loss: float | None = None) -> tuple[bool, float]:
    """One step; `planted` gets into one value of one rank's gradient, before it is reduced over ranks."""
    hooks = []
    if planted is not None and dist.get_rank() == dist.get_world_size() - 1:
        named = [pair for chunk in run.chunks for pair in chunk.named_parameters()]
        # A weight of which each tensor rank has a part: of the others, all tensor ranks have the same gradient. Not one
        # of a linear layer, whose gradient may be added to the buffer without being seen by a hook.
        weight = next(p for name, p in named if name.endswith(("word_embeddings.weight", "output_layer.weight")))

        def plant(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = planted
            return gradient

        hooks.append(weight.register_hook(plant))
    found, _ = global_loss(forward_backward(run.chunks, run.rows, run.recipe))
    for hook in hooks:
        hook.remove()
    return update(run.optimizer, found if loss is None else loss)


def run_case(layout: Layout, parallel: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = Run(layout, folder, **parallel)
    run.train(1)
    before = _state(run)
    skipped = [_step(run, math.nan), _step(run, math.inf), _step(run, None, loss=math.nan)]
    unchanged = all(map(torch.equal, before, _state(run)))
    applied, norm = _step(run, None)
    after = _state(run)
    changed = not all(map(torch.equal, before, after))
    finite = all(bool(torch.isfinite(value).all()) for value in after)
    destroy_groups()
    return {
        "skipped": [not updated for updated, _ in skipped],
        "norms": [math.isfinite(norm) for _, norm in skipped],
        "unchanged": unchanged,
        "continues": applied and math.isfinite(norm) and changed and finite,
    }


def limit(folder: Path) -> dict[str, Any]:
    run = Run(Layout(), folder)
    run.recipe.training.max_skipped_updates = 2
    folder.mkdir(exist_ok=True)
    skipped = SkippedUpdates(run.recipe)
    mine = [f"sample {dist.get_rank()}"]
    skipped.skipped(5, math.nan, 1.0, mine)
    skipped.applied()
    skipped.skipped(7, math.nan, 1.0, mine)
    try:
        skipped.skipped(8, 1.0, math.inf, mine)
        message = ""
    except NonFiniteError as error:
        message = str(error)
    dist.barrier()
    destroy_groups()
    lines = [json.loads(line) for line in (folder / SKIPPED_FILE).read_text().splitlines()]
    return {"message": message, "lines": lines}


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group(timeout_minutes=2):
        results: dict[str, Any] = {
            name: run_case(layout, parallel, folder) for name, (layout, parallel) in CASES.items()
        }
        results["limit"] = limit(folder / "limit")
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, results)
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    main()
