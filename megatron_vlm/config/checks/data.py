"""Checks of data settings against other settings."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem
from megatron_vlm.config.recipe import Recipe


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """Check that what is written has a folder, and that validation has data."""
    if recipe.data.log_samples and not recipe.training.save:
        yield Problem(
            "data.log_samples",
            True,
            "sample lists are written to training.save, which is not set",
            "Set save, or log_samples = false",
        )
    data, training = recipe.data, recipe.training
    if data.valid_data_path and data.valid_share:
        yield Problem(
            "data.valid_share",
            data.valid_share,
            "valid_data_path is set too, and both say what validation data is",
            "Remove one of them",
        )
    if training.best_metric is not None:
        if not (data.valid_data_path or data.valid_share):
            yield Problem(
                "training.best_metric",
                training.best_metric,
                "there is no validation data to measure it on",
                "Set data.valid_data_path or data.valid_share",
            )
        if not training.save:
            yield Problem(
                "training.best_metric",
                training.best_metric,
                "the best checkpoint is written to training.save, which is not set",
                "Set save, or best_metric = null",
            )
