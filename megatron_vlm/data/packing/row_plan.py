"""The rows of a whole run, epoch after epoch, addressed by one number.

Training counts the rows it has consumed since its start; epoch and row follow from that count by adding up the rows of
the epochs before, whatever the number of data-parallel ranks was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.packing.epoch_plan import EpochPlan


@dataclass
class PlannedRow:
    """One row to be built."""

    row_index: int
    """Rows consumed before it since the start of training."""
    epoch: int
    members: np.ndarray
    """[documents] int64: sample numbers"""


class RowPlan:
    """All rows of a training run, without end."""

    def __init__(self, plan_of_epoch: Callable[[int], EpochPlan]) -> None:
        """
        Args:
            plan_of_epoch: the plan of an epoch, from its number alone.
        """
        self._plan_of_epoch = plan_of_epoch
        self._ends: list[int] = []
        """Rows up to the end of each epoch planned so far."""
        self._epoch = -1
        self.current: EpochPlan = self._plan(0)
        """The epoch of the row asked for last."""

    @property
    def rows(self) -> int:
        """Rows of the current epoch."""
        return self.current.rows

    @property
    def packing_efficiency(self) -> float:
        """Tokens over places of the current epoch, 0 to 1."""
        return self.current.packing_efficiency

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch != self._epoch:
            plan = self._plan_of_epoch(epoch)
            if not plan.rows:
                raise DataError("the dataset is empty: no sample is left to train on")
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + plan.rows)
            self.current, self._epoch = plan, epoch
        return self.current

    def row(self, row_index: int) -> PlannedRow:
        """The row that comes after `row_index` others."""
        while row_index >= self._ends[-1]:
            self._plan(len(self._ends))
        epoch = bisect_right(self._ends, row_index)
        start = self._ends[epoch - 1] if epoch else 0
        return PlannedRow(row_index, epoch, np.array(self._plan(epoch).row(row_index - start)))

    def rows_of_rank(self, consumed_rows: int, rank: int, size: int) -> Iterator[PlannedRow]:
        """Every size-th row from `consumed_rows` + `rank` on, for ever: what one of `size` data ranks reads."""
        row_index = consumed_rows + rank
        while True:
            yield self.row(row_index)
            row_index += size
