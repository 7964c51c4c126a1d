"""A packed row equals its documents one by one; documents do not affect each other; rows without images or labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from tests.parallel.rows import SEQ_LENGTH, make_row, tiny_recipe

EQUAL = 1e-5


@pytest.fixture(scope="module")
def model(one_process: None) -> Any:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights

    recipe = tiny_recipe(ParallelConfig())
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    return chunks[0]


def _documents(row: PackedBatch, patches: int) -> list[PackedBatch]:
    """Each document of a row as a row of its own, with the tiles that it uses."""
    documents = []
    for start, end in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False):
        here = (row.feature_positions >= start) & (row.feature_positions < end)
        sources = row.feature_sources[here]
        used = sorted({int(s) // patches for s in sources if s >= 0})
        new_index = {tile: index for index, tile in enumerate(used)}
        moved = [int(s) if s < 0 else new_index[int(s) // patches] * patches + int(s) % patches for s in sources]
        assert row.tiles is not None
        documents.append(
            PackedBatch(
                tokens=row.tokens[start:end],
                labels=row.labels[start:end],
                positions=row.positions[start:end],
                cu_seqlens=[0, end - start],
                feature_positions=row.feature_positions[here] - start,
                feature_sources=torch.tensor(moved, dtype=torch.long),
                num_tiles=len(used),
                tiles=row.tiles[used],
            )
        )
    return documents


def _loss_and_gradients(model: Any, rows: list[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for row in rows:
        loss = model(row)
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("index", range(6))
def test_a_packed_row_equals_its_documents_one_by_one(model: Any, index: int) -> None:
    row = make_row(index)
    packed, gradients = _loss_and_gradients(model, [row])
    separate, expected = _loss_and_gradients(model, _documents(row, model.vision_model.vision.patches_per_tile))
    assert packed == pytest.approx(separate, rel=EQUAL, abs=1e-12)
    for name, gradient in gradients.items():
        norm = float(expected[name].norm())
        assert float((gradient - expected[name]).norm()) <= EQUAL * norm + 1e-9, name


def _logits(model: Any, row: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.language_model.decode(model.embed(row), model.packed_sequence(row))
        return model.language_model.logits(hidden, torch.arange(SEQ_LENGTH))


@pytest.mark.parametrize("index", range(6))
def test_a_document_does_not_affect_another_bit_for_bit(model: Any, index: int) -> None:
    """Other tokens and image features in document 1 change no bit of the other documents' logits."""
    row, changed = make_row(index), make_row(index)
    start, end = row.cu_seqlens[1], row.cu_seqlens[2]
    changed.tokens[start:end] = (changed.tokens[start:end] + 1) % 250
    here = (row.feature_positions >= start) & (row.feature_positions < end)
    changed.feature_sources[here] = -1
    before, after = _logits(model, row), _logits(model, changed)
    assert not torch.equal(before[start:end], after[start:end])
    others = torch.ones(SEQ_LENGTH, dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(before[others], after[others])


def test_positions_restart_in_every_document(model: Any) -> None:
    """The same document twice in a row gives the same logits twice: rotary positions restart at 0."""
    half = SEQ_LENGTH // 2
    row = make_row(1)
    row.tokens[half:] = row.tokens[:half]
    row.positions = torch.arange(half).repeat(2)
    row.cu_seqlens = [0, half, SEQ_LENGTH]
    logits = _logits(model, row)
    assert torch.allclose(logits[:half], logits[half:], atol=1e-5)


def test_a_row_without_images_gives_every_parameter_a_gradient(model: Any) -> None:
    row = make_row(1)
    assert row.num_tiles == 0
    _, gradients = _loss_and_gradients(model, [row])
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        if not name.startswith("language_model."):
            assert not gradient.any(), f"{name} has a nonzero gradient in a row without images"
    assert any(g.any() for name, g in gradients.items() if name.startswith("language_model."))


def test_a_row_without_supervised_tokens_gives_zero_gradients(model: Any) -> None:
    row = make_row(0)
    row.labels[:] = IGNORE_INDEX
    loss, gradients = _loss_and_gradients(model, [row])
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())
