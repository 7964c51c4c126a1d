"""Every model chunk sees every row, and a row that all have seen is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_vlm.training.step import rows_for_chunks


class Row:
    """Stands for a batch."""


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_are_freed_after_the_last_chunk(chunks: int) -> None:
    made: list[Any] = []

    def rows() -> Iterator[Any]:
        while True:
            row = Row()
            made.append(weakref.ref(row))
            yield row
            del row

    iterators = rows_for_chunks(rows(), chunks)
    for number in range(5):
        seen = {id(next(iterator)) for iterator in iterators[1:]} | {id(row := next(iterators[0]))}
        assert len(seen) == 1 and len(made) == number + 1
        del row
    assert sum(reference() is not None for reference in made) <= 1, "the generator above may hold the newest"


def test_chunks_may_be_ahead_of_each_other() -> None:
    first, second = rows_for_chunks(iter(range(4)), 2)  # type: ignore[arg-type]
    assert [next(first) for _ in range(3)] == [0, 1, 2]
    assert [*second] == [0, 1, 2, 3] and [*first] == [3]
