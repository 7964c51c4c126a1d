"""The cost model equals the operations that the model executes for a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config import ParallelConfig, Recipe, load_recipe
from megatron_vlm.config.lora import lora_parameters
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.packing.row_cost import RowCost, cost_of_model, row_cost, step_operations
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from tests.parallel.rows import tiny_recipe


def _row(length: int, tiles: int) -> PackedBatch:
    """One document with one supervised token, and tiles of which a few features are used."""
    vision = tiny_recipe(ParallelConfig()).model.vision
    labels = torch.full((length,), IGNORE_INDEX)
    labels[-2] = 1
    return PackedBatch(
        tokens=torch.arange(length) % 7,
        labels=labels,
        positions=torch.arange(length),
        cu_seqlens=[0, length],
        feature_positions=torch.arange(4),
        feature_sources=torch.arange(4),
        num_tiles=tiles,
        tiles=torch.randn(tiles, 3, vision.image_size, vision.image_size),
    )


ALL = ("vision", "projector", "language")


@pytest.mark.parametrize(
    "trainable",
    [
        ALL,
        ("projector",),
        ("projector", "language"),
        ("language",),
        ("vision", "projector"),
        ("projector", "language_lora"),
    ],
    ids="+".join,
)
def test_cost_equals_the_operations_that_torch_counts(one_process: None, trainable: tuple[str, ...]) -> None:
    """Forward and backward passes of rows of three lengths and two numbers of tiles give the three coefficients."""
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights
    from megatron_vlm.model.layers.lora import adapter_parameters

    recipe = tiny_recipe(ParallelConfig(), trainable=list(trainable))
    (model,) = chunks = build_model(recipe)
    initialize_weights(chunks, recipe)

    def operations(length: int, tiles: int) -> int:
        # In this kernel torch counts each matrix product, masked positions included.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(_row(length, tiles)).backward()
        return counter.get_total_flops()

    short, middle, long = (operations(length, 1) for length in (16, 32, 48))
    squared = (long - 2 * middle + short) / (2 * 16**2)
    linear = (middle - short) / 16 - squared * (16 + 32)
    adapters = lora_parameters(recipe.model.language, recipe.training)
    assert adapters == sum(p.numel() for p in adapter_parameters(model))
    cost = cost_of_model(recipe.model, trainable, adapters)
    assert squared == 2 * cost.per_token_squared  # half of the scores are masked
    assert linear == cost.per_token
    assert operations(16, 3) - short == 2 * cost.per_tile
    # torch counts every score of the square, where half are masked
    whole = step_operations(
        recipe.model, trainable, squared_tokens=16**2, tokens=16, tiles=1, supervised_tokens=1, adapters=adapters
    )
    assert short - cost.per_token_squared * 16**2 == whole


def test_frozen_parts_cost_less() -> None:
    full, warm_up = cost_of_model(ModelConfig()), cost_of_model(ModelConfig(), ("projector",))
    assert warm_up.per_token_squared == full.per_token_squared
    assert warm_up.per_token == pytest.approx(full.per_token * 2 / 3)
    assert warm_up.per_tile < full.per_tile * 0.4


def test_settings_replace_counted_operations() -> None:
    recipe: Recipe = load_recipe(None, {"data": {"cost_per_tile": 0.0, "cost_per_token": 5.0}})
    cost, counted = row_cost(recipe), cost_of_model(recipe.model)
    assert (cost.per_tile, cost.per_token) == (0.0, 5.0)
    assert cost.per_token_squared == counted.per_token_squared


def test_quantized_costs_keep_the_proportions() -> None:
    tokens, tiles = np.array([10, 100, 1000]), np.array([0, 1, 5])
    cost = RowCost(0.5, 3.0, 70.0)
    exact, quantized = cost.of(tokens, tiles), cost.quantized(tokens, tiles, 4096, 16)
    assert (quantized == np.rint(quantized)).all() and quantized.dtype == np.float32
    np.testing.assert_allclose(quantized / quantized[2], exact / exact[2], rtol=0.02)
    assert cost.quantized(np.array([4096]), np.array([16]), 4096, 16) == 1 << 23
    assert not RowCost(0.0, 0.0, 0.0).quantized(tokens, tiles, 4096, 16).any()
