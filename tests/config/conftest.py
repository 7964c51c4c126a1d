"""A small valid recipe, and the problems found after some of its settings are changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_vlm.config import ConfigError, Recipe, check_recipe, load_recipe

SMALL: dict[str, Any] = {
    "model.vision.hidden_size": 32,
    "model.vision.intermediate_size": 64,
    "model.vision.num_hidden_layers": 4,
    "model.vision.num_attention_heads": 4,
    "model.vision.image_size": 28,
    "model.vision.patch_size": 7,
    "model.language.hidden_size": 64,
    "model.language.intermediate_size": 128,
    "model.language.num_hidden_layers": 4,
    "model.language.num_attention_heads": 8,
    "model.language.num_key_value_heads": 4,
    "model.language.vocab_size": 512,
    "model.language.max_position_embeddings": 256,
    "model.image_token_index": 500,
    "model.image_grid_pinpoints": [[28, 28], [28, 56]],
    "data.seq_length": 128,
    "training.global_batch_size": 8,
}


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """{"training.lr": 1} as {"training": {"lr": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, name = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


@pytest.fixture
def small_recipe() -> Callable[[dict[str, Any]], Recipe]:
    """The small recipe with some settings (dotted names) changed."""
    return lambda changes: load_recipe(None, nested(SMALL | changes))


@pytest.fixture
def problems_of(small_recipe: Callable[[dict[str, Any]], Recipe]) -> Callable[..., list[str]]:
    """The problems that reading and check_recipe find in the small recipe with some settings changed."""

    def problems(changes: dict[str, Any], world_size: int = 1) -> list[str]:
        try:
            check_recipe(small_recipe(changes), world_size)
        except ConfigError as error:
            return error.problems
        return []

    return problems
