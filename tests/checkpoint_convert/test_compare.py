"""Pairs of tensors: equality, largest difference, and rounding."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from checkpoint_convert.compare import compare_pair, compare_tensors
from checkpoint_convert.mapping.lazy_tensors import StoredTensors


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_every_bit_counts() -> None:
    first = _random(7, 5)
    assert compare_pair(first, first.clone()).equal
    second = first.clone()
    second[3, 2] = torch.nextafter(first[3, 2], torch.tensor(math.inf))
    found = compare_pair(first, second)
    assert not found.equal
    assert found.largest == float(second[3, 2] - first[3, 2]) > 0
    assert not compare_pair(torch.zeros(3), -torch.zeros(3)).equal, "-0.0 and 0.0 have different bits"
    assert compare_pair(torch.zeros(3), -torch.zeros(3)).largest == 0


def test_nan_differs_from_a_number() -> None:
    first, second = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    assert compare_pair(first, first.clone()).equal
    assert compare_pair(first, second).largest == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    exact = _random(9).to(dtype)
    assert compare_pair(exact, exact.float()).equal, "the same numbers in a wider dtype"
    found = compare_pair(_random(9), exact)
    assert not found.equal
    assert found.rounded
    assert not compare_pair(_random(9) * 1.5, exact).rounded
    assert not compare_pair(_random(9), _random(9) + 1).rounded, "the same dtype: nothing is rounded"


def test_tensors_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_convert.compare._CHUNK", 10)
    first = _random(7, 9)
    second = first.clone()
    second[6, 8] += 1
    assert compare_pair(first, first.clone()).equal
    assert compare_pair(first, second).largest == pytest.approx(1, abs=1e-6)


class _Watched(StoredTensors):
    """Forty tensors; counts how many were in memory at once, over all objects that share the list `created`."""

    most = 0

    def __init__(self, created: list[weakref.ref[torch.Tensor]]) -> None:
        self._entries, self.created = {f"vision_tower.{number}": None for number in range(40)}, created

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.ones(3)
        self.created.append(weakref.ref(tensor))
        self.most = max(self.most, sum(other() is not None for other in self.created))
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return (3,)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def test_one_pair_is_in_memory_at_a_time() -> None:
    created: list[weakref.ref[torch.Tensor]] = []
    first, second = _Watched(created), _Watched(created)
    found = compare_tensors(first, second, list(first))
    assert found.parts["vision"].equal == len(first) == 40
    assert (first.most, second.most) == (1, 2)
