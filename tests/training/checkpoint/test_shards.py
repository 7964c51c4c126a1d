"""Flat ranges of a tensor as boxes."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from megatron_vlm.training.checkpoint.shards import split_into_boxes


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (4, 1, 3), (2, 2, 2, 3)])
def test_boxes_are_the_range(shape: tuple[int, ...]) -> None:
    """Every range of a small tensor: each element once, in order, in few boxes."""
    whole = np.arange(prod(shape)).reshape(shape)
    for start in range(whole.size + 1):
        for end in range(start, whole.size + 1):
            seen: list[int] = []
            boxes = list(split_into_boxes(shape, start, end))
            for corner, sizes, first in boxes:
                box = whole[tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))].ravel()
                assert box.tolist() == list(range(first, first + prod(sizes)))
                seen += box.tolist()
            assert seen == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1


def test_a_scalar_is_one_box() -> None:
    assert list(split_into_boxes((), 0, 1)) == [((), (), 0)]
