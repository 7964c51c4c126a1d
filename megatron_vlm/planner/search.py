"""The parallel layouts of a recipe that fit on some GPUs, fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from megatron_vlm.config import ConfigError, Recipe, check_recipe
from megatron_vlm.config.pipeline_layout import AUTO, format_layout
from megatron_vlm.planner.balance import balanced_stages
from megatron_vlm.planner.devices import GPUS_PER_MACHINE, Device
from megatron_vlm.planner.estimate import Estimate, estimate
from megatron_vlm.planner.recompute import with_recompute
from megatron_vlm.planner.row_work import RowShape, row_work

_RECOMPUTE: tuple[Literal["selective", "full"] | None, ...] = (None, "selective", "full")


def layouts(recipe: Recipe, world_size: int, shape: RowShape) -> Iterator[Recipe]:
    """The recipe in every combination of parallel sizes and recomputation that check_recipe accepts.

    Tensor and context ranks stay inside a machine of eight GPUs. Pipeline stages are balanced for rows of `shape`.
    """
    inside = [size for size in (1, 2, 4, 8) if size <= min(world_size, GPUS_PER_MACHINE)]
    stages = [size for size in range(1, recipe.model.language.num_hidden_layers + 2) if world_size % size == 0]
    for tensor, context, pipeline, virtual in itertools.product(inside, inside, stages, (1, 2)):
        if tensor * context > GPUS_PER_MACHINE or world_size % (tensor * context * pipeline):
            continue
        parallel = replace(
            recipe.parallel,
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_model_parallel_layout=AUTO if pipeline > 1 else None,
        )
        for granularity in _RECOMPUTE:
            candidate = with_recompute(replace(recipe, parallel=parallel), granularity)
            try:
                check_recipe(candidate, world_size)
            except ConfigError:
                continue
            if pipeline > 1:
                stage_layers = balanced_stages(
                    row_work(candidate, shape), recipe.model.language.num_hidden_layers, pipeline, virtual
                )
                candidate.parallel = replace(parallel, pipeline_model_parallel_layout=format_layout(stage_layers))
            yield candidate


def best_layouts(recipe: Recipe, world_size: int, device: Device, shape: RowShape) -> list[Estimate]:
    """All layouts that fit into the device's memory, fastest first; of equals the one with more memory to spare."""
    found = [estimate(candidate, world_size, device, shape) for candidate in layouts(recipe, world_size, shape)]
    fitting = [one for one in found if one.fits(device)]
    return sorted(fitting, key=lambda one: (round(one.step_seconds, 4), one.memory.total))
