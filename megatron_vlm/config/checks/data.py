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
    yield from _check_generation(recipe)
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


def _check_generation(recipe: Recipe) -> Iterator[Problem]:
    """Check that the answers at evaluations have questions and a folder, and weights that the engine computes with."""
    data, training = recipe.data, recipe.training
    number = training.eval_generate_samples
    if number < 1:
        return
    if not (data.valid_data_path or data.valid_share):
        yield Problem(
            "training.eval_generate_samples",
            number,
            "there is no validation data to take questions from",
            "Set data.valid_data_path or data.valid_share",
        )
    if not training.save:
        yield Problem(
            "training.eval_generate_samples",
            number,
            "answers are written to training.save, which is not set",
            "Set save, or eval_generate_samples = 0",
        )
    if training.fp8_format is not None:
        yield Problem(
            "training.eval_generate_samples",
            number,
            f"generation has rows of one token, and FP8 products (fp8_format = {training.fp8_format}) need multiples "
            "of 8",
            "Set eval_generate_samples = 0, or leave fp8_format out",
        )
