"""Settings of the data that only make sense with others."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.problems import Problem
from megatron_vlm.config.recipe import Recipe


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """Where the lists of samples go."""
    if recipe.data.log_samples and not recipe.training.save:
        yield Problem(
            "data.log_samples",
            True,
            "the lists go to training.save, which is not set",
            "Set save, or log_samples = false",
        )
