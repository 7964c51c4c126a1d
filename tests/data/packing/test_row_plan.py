"""row_index determines the row, its epoch and its rank."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.packing.epoch_plan import EpochPlan
from megatron_vlm.data.packing.row_plan import RowPlan


def make_plan() -> RowPlan:
    """Epochs of 5 to 9 rows, each of one sample numbered 100 * epoch + row."""

    def plan_of_epoch(epoch: int) -> EpochPlan:
        rows = 5 + epoch % 5
        return EpochPlan(np.arange(rows + 1), 100 * epoch + np.arange(rows), 1.0)

    return RowPlan(plan_of_epoch)


def test_row_index_determines_epoch_and_row() -> None:
    expected = [100 * epoch + row for epoch in range(20) for row in range(5 + epoch % 5)]
    plan = make_plan()
    assert [int(plan.row(index).members[0]) for index in range(len(expected))] == expected
    for index in (97, 3, 60, 0, 61):  # also backwards, and in a new plan
        assert int(plan.row(index).members[0]) == int(make_plan().row(index).members[0]) == expected[index]
    assert plan.row(12).epoch == 2 and plan.rows == 7


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_of_ranks(size: int) -> None:
    iterators = [make_plan().rows_of_rank(7, rank, size) for rank in range(size)]
    rows = [next(iterator).row_index for _ in range(6) for iterator in iterators]
    assert rows == list(range(7, 7 + 6 * size))


def test_an_epoch_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="the dataset is empty"):
        RowPlan(lambda epoch: EpochPlan(np.zeros(1, int), np.empty(0, int), 0.0))
