"""Pairs of tensors: what counts as equal, how far apart they are, and what rounding explains."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from checkpoint_convert.compare import compare_pair, compare_tensors, part_of
from checkpoint_convert.mapping.lazy_tensors import StoredTensors


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


class _Watched(StoredTensors):
    """Forty tensors, and how many there ever were at once, of all that share the list `made`."""

    most = 0

    def __init__(self, made: list[weakref.ref[torch.Tensor]]) -> None:
        self._places, self.made = {f"vision_tower.{number}": None for number in range(40)}, made

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.ones(3)
        self.made.append(weakref.ref(tensor))
        self.most = max(self.most, sum(other() is not None for other in self.made))
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return (3,)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def test_one_pair_is_in_memory_at_a_time() -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    first, second = _Watched(made), _Watched(made)
    found = compare_tensors(first, second, list(first))
    assert found.parts["vision"].equal == len(first) == 40
    assert (first.most, second.most) == (1, 2)
