"""Every step of recomputation keeps fewer bytes for backward, and changes no gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from tests.parallel.rows import make_row, tiny_recipe
from tests.support.saved_tensors import SavedTensors

SELECTIVE = {"recompute_granularity": "selective", "recompute_vision": False}
FULL = {"recompute_granularity": "full", "recompute_vision": False}
LADDER: dict[str, dict[str, Any]] = {
    "nothing": {},
    "core attention": SELECTIVE | {"recompute_modules": ["core_attn"]},
    "MLP, the default of selective": SELECTIVE,
    "both": SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]},
    "three of four layers": FULL | {"recompute_num_layers": 3},
    "all layers": FULL,
    "and the vision tower": FULL | {"recompute_vision": None},
}
"""From most bytes to least."""


def _forward_backward(**training: Any) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept after the forward pass of a row with images, and all gradients."""
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights

    chunks = build_model(recipe := tiny_recipe(ParallelConfig(), **training))
    initialize_weights(chunks, recipe)
    model = chunks[0]
    with SavedTensors(model.parameters()) as saved:
        loss = model(make_row(0))
    kept = saved.bytes
    loss.backward()
    return kept, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(scope="module")
def measured(one_process: None) -> dict[str, tuple[int, list[torch.Tensor]]]:
    return {name: _forward_backward(**training) for name, training in LADDER.items()}


def test_each_step_keeps_less(measured: dict[str, tuple[int, list[torch.Tensor]]]) -> None:
    kept = {name: bytes_ for name, (bytes_, _) in measured.items()}
    for more, less in itertools.pairwise(kept):
        assert kept[less] < 0.95 * kept[more], (more, less, kept)
    assert kept["all layers"] < 0.3 * kept["nothing"]


def test_gradients_are_the_same_bit_for_bit(measured: dict[str, tuple[int, list[torch.Tensor]]]) -> None:
    _, expected = measured["nothing"]
    for name, (_, gradients) in measured.items():
        assert len(gradients) == len(expected), name
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True)), name


def test_tower_alone_is_recomputed_where_asked_for(one_process: None) -> None:
    without, _ = _forward_backward()
    tower, _ = _forward_backward(recompute_vision=True)
    assert tower < 0.95 * without
