"""The plan of an epoch: which samples share a row, and in which order rows come, from lengths alone.

An epoch's samples, in the order the mixture gives, are cut into windows; each window is packed by itself into rows
that hold both budgets and cost the same (`balance.py`). What cost is left to differ is met by the order of the rows:
over a window it rises once and falls once, and the next window begins where it ended, with the cheapest rows. So rows
next to each other, which are rows that run at the same time, cost about the same, whatever the number of data ranks
and of rows per step; and every window has all the costs, so that nothing drifts.

All of it follows from (seed, epoch): every machine finds the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.packing.exchange import Lengths, balance_rows
from megatron_vlm.data.packing.row_cost import RowCost, cost_of_model

PLAN_VERSION = 4
"""Of the rule by which rows are found: a run that goes on under another would see other rows."""


@dataclass
class Budget:
    """What a row holds at most, how many samples are packed together, and what a row costs."""

    seq_length: int
    max_tiles: int
    window: int
    cost: RowCost = field(default_factory=lambda: cost_of_model(ModelConfig()))


@dataclass
class EpochPlan:
    """The rows of one epoch."""

    row_starts: np.ndarray
    """[rows + 1] int64: row r has the members row_starts[r] to row_starts[r + 1]."""
    members: np.ndarray
    """[samples] int64: sample numbers, row after row."""
    packing_efficiency: float
    """Tokens over places, 0 to 1."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Sample numbers of a row."""
        return self.members[self.row_starts[index] : self.row_starts[index + 1]]


def pack_window(
    tokens: np.ndarray, tiles: np.ndarray, budget: Budget, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Share samples out to rows, and put the rows in order.

    Args:
        tokens: [n] of each sample, at most the budget's.
        tiles: [n] of each sample, at most the budget's.
        budget: of a row.
        rng: decides among what is alike.

    Returns:
        (members [n]: sample numbers, row after row; counts [rows]: samples of each row).
    """
    cost = budget.cost.quantized(tokens, tiles, budget.seq_length, budget.max_tiles)
    lengths = Lengths.of(tokens, tiles, cost, budget.seq_length, budget.max_tiles)
    rows = balance_rows(lengths, rng.permutation(len(tokens)), rng)
    rows = rows[_rise_and_fall(lengths.cost[rows].sum(1))]
    # Within a row, any order: the free places go to the end and are left out.
    keys = rng.random(rows.shape)
    keys[rows == lengths.empty] = 2
    rows = np.take_along_axis(rows, np.argsort(keys, axis=1, kind="stable"), 1)
    taken = rows != lengths.empty
    return rows[taken], taken.sum(1)


def _rise_and_fall(cost: np.ndarray) -> np.ndarray:
    """An order of rows in which the cost rises to the highest and falls again."""
    ascending = np.argsort(cost, kind="stable")
    return np.concatenate([ascending[::2], ascending[1::2][::-1]])


def plan_epoch(
    samples: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, budget: Budget, seed: int, epoch: int
) -> EpochPlan:
    """Cut into windows, pack, order.

    Args:
        samples: numbers of the epoch's samples in the order they come, some perhaps more than once.
        tokens: tokens by sample number.
        tiles: tiles by sample number.
        budget: none of the samples exceeds it.
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
    places = max((len(starts) - 1) * budget.seq_length, 1)
    return EpochPlan(starts, flat, float(tokens[flat].sum(dtype=np.int64)) / places)
