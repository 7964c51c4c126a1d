"""`recompute_granularity: auto`: the recomputation of a run is chosen when it starts, from the memory of its GPUs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.planner.devices import GB
from megatron_vlm.planner.recompute import cheapest_recompute, describe_recompute, with_recompute
from megatron_vlm.runtime.device import current_device, device_memory
from megatron_vlm.runtime.logging import log_rank0


def resolve_recompute(recipe: Recipe) -> None:
    """Replace `auto` by the cheapest recomputation that fits on the GPU with least memory; collective.

    Rows are taken to be full of images. On a CPU nothing is recomputed.
    """
    if recipe.training.recompute_granularity != "auto":
        return
    memory = device_memory()
    if memory is None:
        _replace_training(recipe, with_recompute(recipe))
        log_rank0("recompute_granularity auto: nothing is recomputed on a CPU")
        return
    least = torch.tensor(memory, device=current_device())
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    rung, fits = cheapest_recompute(recipe, dist.get_world_size(), int(least))
    _replace_training(recipe, rung.recipe)
    log_rank0(
        f"recompute_granularity auto: backward recomputes {describe_recompute(rung.recipe)}; estimated "
        f"{rung.memory / GB:.1f} of {int(least) / GB:.1f} GB"
        + ("" if fits else ", which may not fit. More tensor- or context-parallel ranks take less memory each.")
    )


def _replace_training(recipe: Recipe, chosen: Recipe) -> None:
    """In place: the parts of a run share one recipe."""
    for name in (field.name for field in fields(recipe.training) if field.name.startswith("recompute_")):
        value: Any = getattr(chosen.training, name)
        setattr(recipe.training, name, value)
