"""The rows of a whole run, epoch after epoch, addressed by one index.

The row_index of a row is the number of rows that all ranks together consume before it. Its epoch follows from adding up
the rows of the epochs before, so it does not depend on the number of data-parallel ranks.
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
    """One row to build."""

    row_index: int
    """Index of the row in the run."""
    epoch: int
    members: np.ndarray
    """[documents] int64: global sample numbers"""


class RowPlan:
    """All rows of a training run, without end. Raises DataError if an epoch has no row."""

    def __init__(self, plan_of_epoch: Callable[[int], EpochPlan]) -> None:
        """
        Args:
            plan_of_epoch: returns the plan of an epoch.
        """
        self._plan_of_epoch = plan_of_epoch
        self._ends: list[int] = []
        """Number of rows up to the end of each epoch planned so far."""
        self._epoch = -1
        self.current: EpochPlan = self._plan(0)
        """The epoch of the last requested row."""

    @property
    def rows(self) -> int:
        """Number of rows of the current epoch."""
        return self.current.rows

    @property
    def packing_efficiency(self) -> float:
        """Fraction of the current epoch's positions that hold tokens, 0 to 1."""
        return self.current.packing_efficiency

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch != self._epoch:
            plan = self._plan_of_epoch(epoch)
            if not plan.rows:
                raise DataError("the dataset is empty: no sample is usable. Check data_path and its sampling rules.")
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + plan.rows)
            self.current, self._epoch = plan, epoch
        return self.current

    def row(self, row_index: int) -> PlannedRow:
        """The row of the run with this index."""
        while row_index >= self._ends[-1]:
            self._plan(len(self._ends))
        epoch = bisect_right(self._ends, row_index)
        start = self._ends[epoch - 1] if epoch else 0
        return PlannedRow(row_index, epoch, np.array(self._plan(epoch).row(row_index - start)))

    def rows_of_rank(self, consumed_rows: int, rank: int, size: int) -> Iterator[PlannedRow]:
        """The rows of data-parallel rank `rank` of `size`: every size-th row from `consumed_rows` + `rank` on."""
        row_index = consumed_rows + rank
        while True:
            yield self.row(row_index)
            row_index += size
