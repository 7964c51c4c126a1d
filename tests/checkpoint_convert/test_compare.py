"""Pairs of tensors: what counts as equal, how far apart they are, and what rounding explains."""

from __future__ import annotations

import math

import pytest
import torch

from checkpoint_convert.compare import compare_pair, part_of


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_every_bit_counts() -> None:
    first = _drawn(7, 5)
    assert compare_pair(first, first.clone()).equal
    second = first.clone()
    second[3, 2] = torch.nextafter(first[3, 2], torch.tensor(math.inf))
    found = compare_pair(first, second)
    assert not found.equal
    assert found.largest == float(second[3, 2] - first[3, 2]) > 0
    assert not compare_pair(torch.zeros(3), -torch.zeros(3)).equal, "-0.0 is another number in a file"
    assert compare_pair(torch.zeros(3), -torch.zeros(3)).largest == 0


def test_not_a_number_is_told_from_a_number() -> None:
    first, second = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    assert compare_pair(first, first.clone()).equal
    assert compare_pair(first, second).largest == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    exact = _drawn(9).to(dtype)
    assert compare_pair(exact, exact.float()).equal, "the same numbers, stored wider"
    found = compare_pair(_drawn(9), exact)
    assert not found.equal
    assert found.rounded
    assert not compare_pair(_drawn(9) * 1.5, exact).rounded
    assert not compare_pair(_drawn(9), _drawn(9) + 1).rounded, "one dtype: nothing was rounded"


def test_tensors_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_convert.compare._CHUNK", 10)
    first = _drawn(7, 9)
    second = first.clone()
    second[6, 8] += 1
    assert compare_pair(first, first.clone()).equal
    assert compare_pair(first, second).largest == pytest.approx(1, abs=1e-6)


def test_parts() -> None:
    parts = {
        "vision_tower.x": "vision",
        "multi_modal_projector.linear_1.bias": "projector",
        "image_newline": "projector",
        "language_model.lm_head.weight": "language",
        "lora_A.weight": "other",
    }
    assert {name: part_of(name) for name in parts} == parts
