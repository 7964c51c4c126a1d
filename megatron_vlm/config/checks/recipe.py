"""Checks of a whole recipe: all problems are found before a model is built and reported in one error."""

from __future__ import annotations

from megatron_vlm.config.checks.data import check_data
from megatron_vlm.config.checks.fp8 import check_fp8
from megatron_vlm.config.checks.lora import check_lora
from megatron_vlm.config.checks.model import check_language, check_vision
from megatron_vlm.config.checks.paths import path_problems
from megatron_vlm.config.checks.schedule import check_rampup, check_schedule
from megatron_vlm.config.checks.training import check_batch, check_optimization, check_recompute
from megatron_vlm.config.checks.values import check_values
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.recipe import Recipe


def check_recipe(recipe: Recipe, world_size: int, *, paths: bool = False) -> None:
    """Raise ConfigError with all problems of running `recipe` on `world_size` processes.

    With `paths`, the problems that `check_paths` finds are included; without, no file is accessed.
    """
    problems = [
        *check_values(recipe),
        *check_vision(recipe),
        *check_language(recipe),
        *check_batch(recipe, world_size),
        *check_rampup(recipe, world_size),
        *check_optimization(recipe),
        *check_recompute(recipe),
        *check_lora(recipe),
        *(check_schedule(recipe) if recipe.training.epochs is None else []),
        *check_fp8(recipe),
        *check_data(recipe),
        *(path_problems(recipe) if paths else []),
    ]
    if problems:
        raise ConfigError([str(problem) for problem in problems])


def check_paths(recipe: Recipe) -> None:
    """Raise ConfigError with every path in the recipe that is missing or of the wrong type."""
    problems = path_problems(recipe)
    if problems:
        raise ConfigError([str(problem) for problem in problems])
