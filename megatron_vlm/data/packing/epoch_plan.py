"""The plan of an epoch: which samples share a row, and in which order rows come, from lengths alone.

The samples of an epoch, in the order of the mixture, are split into windows. Each window is packed by itself into rows
within both budgets that cost the same (`exchange.py`). The rows of a window are ordered by their remaining differences
in cost: from the cheapest up to the most expensive and back down. The next window then starts with its cheapest rows
too. So consecutive rows, which run at the same time on different ranks, cost about the same for any number of
data-parallel ranks and rows per step, and the mean cost does not drift over the epoch.

The plan depends on lengths, budgets, seed and epoch only: every machine computes the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.packing.exchange import Lengths, balance_rows
from megatron_vlm.data.packing.row_cost import RowCost, cost_of_model

PLAN_VERSION = 4
"""Version of the packing algorithm. A run that resumes under another version would see other rows."""


@dataclass
class Budget:
    """The budgets of a row, the number of samples in a window, and the cost model."""

    seq_length: int
    max_tiles: int
    window: int
    cost: RowCost = field(default_factory=lambda: cost_of_model(ModelConfig()))


@dataclass
class EpochPlan:
    """The rows of one epoch."""

    row_starts: np.ndarray
    """[rows + 1] int64: row r has members[row_starts[r] : row_starts[r + 1]]."""
    members: np.ndarray
    """[samples] int64: global sample numbers, row by row."""
    packing_efficiency: float
    """Fraction of the rows' positions that hold tokens, 0 to 1."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def fingerprint(self) -> str:
        """Of all rows: equal plans have equal ones."""
        return hashlib.sha256(self.row_starts.tobytes() + self.members.tobytes()).hexdigest()[:16]

    def row(self, index: int) -> np.ndarray:
        """[documents] int64: global sample numbers of a row."""
        return self.members[self.row_starts[index] : self.row_starts[index + 1]]


def pack_window(
    tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pack the n samples of a window into rows, and order the rows.

    Args:
        tokens: [n] tokens of each sample, at most budget.seq_length.
        tiles: [n] tiles of each sample, at most budget.max_tiles.
        budget: of a row.
        rng: for everything the budgets and costs leave open.

    Returns:
        (members [n]: indices into the window, row by row; counts [rows]: number of samples of each row).
    """
    cost = budget.cost.quantized(tokens, tiles, budget.seq_length, budget.max_tiles)
    lengths = Lengths.of(tokens, tiles, cost, budget.seq_length, budget.max_tiles)
    rows = balance_rows(lengths, rng.permutation(len(tokens)), rng)
    rows = rows[_rise_and_fall(lengths.cost[rows].sum(1))]
    # Samples of a row come in random order. Empty slots are sorted to the end and dropped.
    keys = rng.random(rows.shape)
    keys[rows == lengths.empty] = 2
    rows = np.take_along_axis(rows, np.argsort(keys, axis=1, kind="stable"), 1)
    filled = rows != lengths.empty
    return rows[filled], filled.sum(1)


def _rise_and_fall(cost: np.ndarray) -> np.ndarray:
    """[rows] an order of rows in which the cost rises to its maximum and falls again."""
    ascending = np.argsort(cost, kind="stable")
    return np.concatenate([ascending[::2], ascending[1::2][::-1]])


def plan_epoch(
    samples: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, budget: Budget, seed: int, epoch: int
) -> EpochPlan:
    """Split an epoch into windows, pack each, and order its rows.

    Args:
        samples: [m] global sample numbers of the epoch in the order of the mixture; a number may occur several times.
        tokens: [n] tokens of all samples, by global sample number.
        tiles: [n] tiles of all samples, by global sample number.
        budget: of a row; no sample exceeds it.
        seed: of the data order.
        epoch: from 0.
    """
    members, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, window in enumerate(np.array_split(samples, max(-(-len(samples) // budget.window), 1))):
        rng = np.random.default_rng([seed, epoch, number])
        packed, rows = pack_window(tokens[window], tiles[window], budget, rng)
        members.append(window[packed])
        counts.append(rows)
    flat = np.concatenate(members)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    capacity = max((len(starts) - 1) * budget.seq_length, 1)
    return EpochPlan(starts, flat, float(tokens[flat].sum(dtype=np.int64)) / capacity)
