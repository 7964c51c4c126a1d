"""Each loss normalization against torch's cross entropy of the documents, one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.config import ParallelConfig, Recipe
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.data.rows.loss_weights import token_weights
from tests.parallel.rows import SEQ_LENGTH, make_row, tiny_recipe

ROWS = 8
"""Rows of a step; one of five has no supervised token."""


def _expected(losses: list[torch.Tensor], normalization: str) -> float:
    """From the token losses of each document, in the words of the settings' documentation."""
    losses = [document for document in losses if len(document)]
    if normalization == "token":
        return float(torch.cat(losses).mean())
    if normalization == "sample":
        return float(torch.stack([document.mean() for document in losses]).mean())
    weights = [math.sqrt(len(document)) for document in losses]
    return sum(w * float(document.mean()) for w, document in zip(weights, losses, strict=True)) / sum(weights)


def _document_losses(model: Any, row: PackedBatch) -> list[torch.Tensor]:
    with torch.no_grad():
        hidden = model.language_model.decode(model.embed(row), model.packed_sequence(row))
        logits = model.language_model.logits(hidden, torch.arange(SEQ_LENGTH))
    losses = F.cross_entropy(logits.double(), row.labels, ignore_index=IGNORE_INDEX, reduction="none")
    bounds = zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False)
    return [losses[start:end][row.labels[start:end] != IGNORE_INDEX] for start, end in bounds]


@pytest.fixture(scope="module")
def build(one_process: None) -> Any:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights
    from megatron_vlm.training.optimizer import wrap_for_data_parallel

    def wrapped(normalization: str) -> tuple[Recipe, Any]:
        recipe = tiny_recipe(ParallelConfig(), loss_normalization=normalization)
        chunks = build_model(recipe)
        initialize_weights(chunks, recipe)
        return recipe, wrap_for_data_parallel(chunks, recipe)

    return wrapped


@pytest.mark.parametrize("normalization", ["token", "sample", "sqrt"])
def test_the_loss_of_a_step_is_that_of_its_documents(build: Any, normalization: str) -> None:
    from megatron_vlm.training.step import forward_backward, global_loss

    recipe, chunks = build(normalization)
    rows = [make_row(index) for index in range(ROWS)]
    loss, count = global_loss(forward_backward(chunks, [iter(rows)], recipe))
    documents = [document for row in rows for document in _document_losses(chunks[0].module, row)]
    assert loss == pytest.approx(_expected(documents, normalization), rel=1e-6)
    assert count == sum(map(len, documents))


@pytest.mark.parametrize("normalization", ["token", "sample", "sqrt"])
def test_an_evaluation_gives_the_loss_of_each_dataset(build: Any, normalization: str) -> None:
    from megatron_vlm.data.rows.rank_batch import rank_batch
    from megatron_vlm.model.rank_view import rank_view
    from megatron_vlm.training.validation import dataset_losses

    recipe, chunks = build(normalization)
    rows = [make_row(index) for index in range(ROWS)]
    view = replace(rank_view(recipe), by_dataset=True)
    found = dataset_losses(chunks, [iter([rank_batch(row, view) for row in rows])], recipe, ROWS, datasets=2)
    documents = [_document_losses(chunks[0].module, row) for row in rows]
    for dataset in (0, 1):
        own = [losses for row in documents for losses in row[dataset::2]]
        loss, weight, count = found[dataset].tolist()
        assert loss / weight == pytest.approx(_expected(own, normalization), rel=1e-6)
        assert count == sum(map(len, own))


@pytest.mark.parametrize("normalization", ["token", "sample", "sqrt"])
def test_gradients_are_those_of_the_loss(build: Any, normalization: str) -> None:
    """Along the gradient, the loss changes by its squared norm."""
    from megatron_vlm.training.step import forward_backward, global_loss

    recipe, chunks = build(normalization)
    rows = [make_row(index) for index in range(ROWS)]
    forward_backward(chunks, [iter(rows)], recipe)
    gradients = [p.main_grad.clone() for p in chunks[0].parameters()]
    squared = sum(float(g.double().square().sum()) for g in gradients)
    step, losses = 1e-2 / math.sqrt(squared), []
    for sign in (1, -2):
        for parameter, gradient in zip(chunks[0].parameters(), gradients, strict=True):
            parameter.data += sign * step * gradient
        losses.append(global_loss(forward_backward(chunks, [iter(rows)], recipe, forward_only=True))[0])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(squared, rel=1e-3)


def test_weights_count_relative_to_each_other(build: Any) -> None:
    """megatron-core 0.19 would divide by 1 where a step's weights sum to less."""
    from megatron_vlm.data.rows.rank_batch import rank_batch
    from megatron_vlm.model.rank_view import rank_view
    from megatron_vlm.training.step import forward_backward

    recipe, chunks = build("sample")
    rows = [rank_batch(make_row(index), rank_view(recipe)) for index in range(ROWS)]
    smaller = [
        replace(row, token_weights=row.token_weights / 1024, loss_weight=row.loss_weight / 1024)
        for row in rows
        if row.token_weights is not None
    ]
    assert len(smaller) == ROWS and sum(row.loss_weight for row in smaller) < 1
    gradients = []
    for step in (rows, smaller):
        forward_backward(chunks, [iter(step)], recipe)
        gradients.append(torch.cat([parameter.main_grad.flatten() for parameter in chunks[0].parameters()]).clone())
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-6


@pytest.mark.parametrize(("normalization", "total"), [("token", 6), ("sample", 2), ("sqrt", math.sqrt(2) + 2)])
def test_weights_of_a_row(normalization: Any, total: float) -> None:
    labels = torch.full((12,), IGNORE_INDEX)
    labels[[0, 1]], labels[[4, 5, 6, 7]] = 1, 1
    none = torch.zeros(0, dtype=torch.long)
    row = PackedBatch(labels, labels, labels, [0, 4, 9, 12], none, none, 0)
    weights = token_weights(row, normalization)
    assert float(weights.sum()) == pytest.approx(total)
    assert not weights[labels == IGNORE_INDEX].any()
