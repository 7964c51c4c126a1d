"""The cost of a row is what the model computes for it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.config import Recipe, load_recipe
from megatron_vlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.data.cost import RowCost, cost_of_model, row_cost


def test_operations_of_a_model_small_enough_to_count() -> None:
    vision = VisionConfig(
        hidden_size=2, intermediate_size=3, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=2
    )
    language = LanguageConfig(
        hidden_size=4, intermediate_size=5, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
    )
    cost = cost_of_model(ModelConfig(vision, language), ("language",))
    # Three layers, forward and twice backward: of l * l scores and as many values, half are masked.
    assert cost.per_token_squared == 3 * 3 * (2 * 2 * 4 / 2)
    # Query and output 4x4, key and value 4x2 each, three matrices of 4x5; two operations each; three passes.
    assert cost.per_token == 3 * 3 * 2 * (2 * 16 + 2 * 8 + 3 * 20)
    # One layer is used, forward only: 5 positions with four 2x2 and two 2x3 matrices, 5 * 5 scores and values.
    tower = 2 * 5 * (4 * 4 + 2 * 6) + 2 * 2 * 5 * 5 * 2
    assert cost.per_tile == tower + 4 * 2 * (2 * 4 + 4 * 4)


def test_what_is_frozen_costs_less() -> None:
    whole, warm_up = cost_of_model(ModelConfig()), cost_of_model(ModelConfig(), ("projector",))
    assert warm_up.per_token_squared == whole.per_token_squared
    assert warm_up.per_token == pytest.approx(whole.per_token * 2 / 3)
    assert warm_up.per_tile < whole.per_tile * 0.4


def test_settings_replace_what_is_counted() -> None:
    recipe: Recipe = load_recipe(None, {"data": {"cost_per_tile": 0.0, "cost_per_token": 5.0}})
    cost, counted = row_cost(recipe), cost_of_model(recipe.model)
    assert (cost.per_tile, cost.per_token) == (0.0, 5.0)
    assert cost.per_token_squared == counted.per_token_squared


def test_whole_costs_keep_the_proportions() -> None:
    tokens, tiles = np.array([10, 100, 1000]), np.array([0, 1, 5])
    cost = RowCost(0.5, 3.0, 70.0)
    exact, whole = cost.of(tokens, tiles), cost.whole(tokens, tiles, 4096, 16)
    assert (whole == np.rint(whole)).all() and whole.dtype == np.float32
    np.testing.assert_allclose(whole / whole[2], exact / exact[2], rtol=0.02)
    assert cost.whole(np.array([4096]), np.array([16]), 4096, 16) == 1 << 23
    assert not RowCost(0.0, 0.0, 0.0).whole(tokens, tiles, 4096, 16).any()
