"""The cheapest recomputation with which a recipe fits into memory: `recompute_granularity: auto`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_vlm.config import Recipe
from megatron_vlm.config.training import DEFAULT_RECOMPUTE_MODULES
from megatron_vlm.planner.balance import layers_per_stage, stage_work
from megatron_vlm.planner.devices import USABLE_MEMORY
from megatron_vlm.planner.memory import rank_memory
from megatron_vlm.planner.row_work import RowShape, row_work


@dataclass(frozen=True)
class Rung:
    """A recipe with one choice of recomputation."""

    recipe: Recipe
    work: float
    """Of a row on the busiest pipeline rank, recomputation included; to be compared with that of others."""
    memory: int
    """Bytes on the fullest rank."""


def recompute_ladder(recipe: Recipe, world_size: int, shape: RowShape | None = None) -> list[Rung]:
    """Every choice of recomputation that saves memory against all cheaper ones, cheapest first.

    Args:
        recipe: a recipe that has passed check_recipe; its own settings of recomputation do not count.
        world_size: number of ranks.
        shape: of a row; by default full of images, which takes the most memory.
    """
    shape = shape or RowShape.of_recipe(recipe)
    rungs = [_rung(with_recompute(recipe, **settings), world_size, shape) for settings in _choices(recipe)]
    ladder: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.work, rung.memory)):
        if not ladder or rung.memory < ladder[-1].memory:
            ladder.append(rung)
    return ladder


def cheapest_recompute(
    recipe: Recipe, world_size: int, memory: float, shape: RowShape | None = None
) -> tuple[Rung, bool]:
    """`cheapest_rung` of the recipe's ladder; arguments as of `recompute_ladder`."""
    return cheapest_rung(recompute_ladder(recipe, world_size, shape), memory)


def cheapest_rung(ladder: Sequence[Rung], memory: float) -> tuple[Rung, bool]:
    """The first rung that fits on a device with `memory` bytes, and whether there is one.

    If none fits it is the last one, which takes the least memory.
    """
    fitting = [rung for rung in ladder if rung.memory <= USABLE_MEMORY * memory]
    return (fitting[0], True) if fitting else (ladder[-1], False)


def with_recompute(
    recipe: Recipe,
    recompute_granularity: Any = None,
    recompute_modules: Any = None,
    recompute_num_layers: int | None = None,
    recompute_vision: bool | None = None,
) -> Recipe:
    """The recipe with these settings of recomputation and no others."""
    training = replace(
        recipe.training,
        recompute_granularity=recompute_granularity,
        recompute_modules=recompute_modules,
        recompute_num_layers=recompute_num_layers,
        recompute_vision=recompute_vision,
    )
    return replace(recipe, training=training)


def describe_recompute(recipe: Recipe) -> str:
    """Such as `full of 4 layers and the vision tower`."""
    training = recipe.training
    parts = []
    if training.recompute_granularity == "selective":
        parts.append(" and ".join(training.recompute_modules or DEFAULT_RECOMPUTE_MODULES) + " of each language layer")
    elif training.recompute_granularity == "full":
        layers = training.recompute_num_layers
        count = f"{layers} language layer{'s' if layers and layers > 1 else ''} of each stage"
        parts.append(count if layers else "all language layers")
    if training.recomputes_vision and "vision" in training.trainable:
        parts.append("the vision tower")
    return ", ".join(parts) or "nothing"


def _choices(recipe: Recipe) -> Iterator[dict[str, Any]]:
    layers = max(layers_per_stage(with_recompute(recipe)))
    for vision in (False, True) if "vision" in recipe.training.trainable else (False,):
        yield {"recompute_vision": vision}
        for modules in (["core_attn"], ["mlp"], ["core_attn", "mlp"]):
            yield {"recompute_granularity": "selective", "recompute_modules": modules, "recompute_vision": vision}
        for count in [*range(1, layers), None]:
            yield {"recompute_granularity": "full", "recompute_num_layers": count, "recompute_vision": vision}


def _rung(recipe: Recipe, world_size: int, shape: RowShape) -> Rung:
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    return Rung(
        recipe,
        work=max(stage_work(recipe, layers_per_stage(recipe), row_work(recipe, shape))),
        memory=max(rank_memory(recipe, world_size, rank, shape).total for rank in stages),
    )
