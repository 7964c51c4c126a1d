"""Checks of data settings against other settings."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem
from megatron_vlm.config.recipe import Recipe


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """Check that sample logs have a folder to be written to."""
    if recipe.data.log_samples and not recipe.training.save:
        yield Problem(
            "data.log_samples",
            True,
            "sample lists are written to training.save, which is not set",
            "Set save, or log_samples = false",
        )
