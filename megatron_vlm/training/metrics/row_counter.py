"""Counts the rows that a rank reads, and measures how long it waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.data.rows.rank_batch import RankBatch
from megatron_vlm.runtime.process_groups import ParallelRanks
from megatron_vlm.training.metrics.phases import PhaseTimer


@dataclass
class RowCounts:
    """What this rank read for a step. Ranks that read the same rows count them once."""

    tokens: int = 0
    squared_tokens: int = 0
    """Sum of the squared lengths of the documents."""
    tiles: int = 0
    rows: int = 0
    wait_seconds: float = 0.0
    sample_ids: list[str] = field(default_factory=list)


class RowCounter(Iterator[RankBatch]):
    """Yields rows and counts them; only one rank of those with the same rows counts."""

    def __init__(self, rows: Iterator[Any], ranks: ParallelRanks, timer: PhaseTimer) -> None:
        self._rows, self._timer = rows, timer
        self.is_counting = ranks.is_row_leader and ranks.is_first_stage
        self._counts = RowCounts()

    def __next__(self) -> RankBatch:
        started = time.perf_counter()
        with self._timer.phase("data"):
            row: RankBatch = next(self._rows)
        counts = self._counts
        counts.wait_seconds += time.perf_counter() - started
        if self.is_counting:
            counts.tokens += row.num_tokens
            counts.squared_tokens += row.squared_tokens
            counts.tiles += row.num_tiles
            counts.rows += 1
            counts.sample_ids += row.sample_ids
        return row

    def take(self) -> RowCounts:
        """What was counted since the last call."""
        taken, self._counts = self._counts, RowCounts()
        return taken
