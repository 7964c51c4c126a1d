"""Checks of LoRA's settings against the other trained parts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem
from megatron_vlm.config.lora import LANGUAGE_LORA, uses_lora
from megatron_vlm.config.recipe import Recipe


def check_lora(recipe: Recipe) -> Iterator[Problem]:
    """Check that adapters are of a frozen language model."""
    training = recipe.training
    if uses_lora(training) and "language" in training.trainable:
        yield Problem(
            "training.trainable",
            training.trainable,
            f"{LANGUAGE_LORA} trains adapters of a frozen language model, and language trains the model itself",
            f"Leave out language or {LANGUAGE_LORA}",
        )
