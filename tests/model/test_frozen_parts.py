"""Frozen parts keep nothing for backward, except what the gradients of their inputs need."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.config import ParallelConfig
from tests.parallel.rows import SEQ_LENGTH, make_row, tiny_recipe
from tests.support.saved_tensors import SavedTensors

FP32 = 4
ALL = ["vision", "projector", "language"]


def _kept(trainable: list[str]) -> tuple[int, int, int]:
    """Bytes that a row with images keeps in tower and projector, in the language layers, and in the loss head."""
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights

    chunks = build_model(recipe := tiny_recipe(ParallelConfig(), trainable=trainable))
    initialize_weights(chunks, recipe)
    model: Any = chunks[0]
    row = model.on_device(make_row(0))
    with SavedTensors(model.parameters()) as saved:
        hidden = model.embed(row)
        first = saved.bytes
        hidden = model.language_model.decode(hidden, model.packed_sequence(row))
        second = saved.bytes
        loss = model.language_model.loss(hidden, row.supervised, row.targets)
        third = saved.bytes
    loss.backward()
    frozen = [p for part, parameters in model.parts().items() if part not in trainable for p in parameters]
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for part in trainable for p in model.parts()[part])
    return first, second - first, third - second


@pytest.fixture(scope="module")
def whole(one_process: None) -> tuple[int, int, int]:
    return _kept(ALL)


def test_frozen_tower_and_projector_keep_nothing(whole: tuple[int, int, int]) -> None:
    first, layers, head = _kept(["language"])
    indices = 2 * 8 * len(make_row(0).feature_positions) + 8 * SEQ_LENGTH  # of tokens, and of where features go
    assert first <= indices < 0.02 * whole[0]
    assert (layers, head) == whole[1:]


def test_projector_alone_keeps_its_own_activations(whole: tuple[int, int, int]) -> None:
    """The input of each of its two linear layers, and of the activation between them; nothing of the tower."""
    recipe = tiny_recipe(ParallelConfig())
    vision, width = recipe.model.vision, recipe.model.language.hidden_size
    tokens = make_row(0).num_tiles * vision.tokens_per_tile
    own = FP32 * tokens * (vision.hidden_size + 2 * width)
    first, _, _ = _kept(["projector"])
    assert own <= first < 1.1 * own + FP32 * width * width, "torch keeps a transposed weight"


def test_frozen_language_model_keeps_no_input_of_a_linear_layer(whole: tuple[int, int, int]) -> None:
    """Their inputs are needed for the gradients of weights only: two norms, attention and SwiGLU."""
    language = tiny_recipe(ParallelConfig()).model.language
    _, layers, head = _kept(["projector"])
    inputs = 3 * language.hidden_size + language.intermediate_size
    assert whole[1] - layers == FP32 * SEQ_LENGTH * inputs * language.num_hidden_layers
    weight = FP32 * language.vocab_size * language.hidden_size
    assert whole[2] - head == weight, "the loss head keeps the gradient of its weight, if that is trained"
