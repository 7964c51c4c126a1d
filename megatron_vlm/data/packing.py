"""The plan: which samples share a row, and in which order rows come, from lengths alone.

An epoch's samples, in the order the mixture gives, are cut into windows; each window is packed by itself under two
budgets, tokens and tiles, and its rows are shuffled. All of it follows from (seed, epoch): every rank computes the same
plan. Training counts the rows it has consumed since its start; epoch and row follow from that count by adding up the
rows of the epochs before, whatever the number of data-parallel ranks was.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.errors import DataError

_SETS_TRIED = 24
"""Sets of samples tried to close a row with."""
_AMPLE = 3
"""While a row has room for this many of its longest sample, samples are taken as they come."""
_CLOSE_ENOUGH = 500
"""A set that leaves less than this part of its room free is taken at once."""


class _Remaining:
    """Samples of a window not yet placed, by tiles and tokens. Samples alike in both are interchangeable."""

    def __init__(self, tokens: np.ndarray, tiles: np.ndarray) -> None:
        self.count = len(tokens)
        self._numbers: dict[tuple[int, int], list[int]] = {}
        for number, kind in enumerate(zip(tiles.tolist(), tokens.tolist(), strict=True)):
            self._numbers.setdefault(kind, []).append(number)
        self.lengths: dict[int, list[int]] = {}
        """Distinct tokens by tiles, ascending."""
        for tile, token in sorted(self._numbers):
            self.lengths.setdefault(tile, []).append(token)

    def has(self, tile: int, token: int) -> bool:
        return (tile, token) in self._numbers

    def take(self, tile: int, token: int) -> int:
        """Remove a sample of this kind and return its number."""
        numbers = self._numbers[tile, token]
        number = numbers.pop()
        self.count -= 1
        if not numbers:
            del self._numbers[tile, token]
            lengths = self.lengths[tile]
            del lengths[bisect_right(lengths, token) - 1]
            if not lengths:
                del self.lengths[tile]
        return number

    def longest(self, token_budget: int, tile_budget: int) -> tuple[int, int] | None:
        """(tiles, tokens) of the longest sample within both budgets; the one of more tiles where equally long."""
        best: tuple[int, int] | None = None
        for tile, lengths in self.lengths.items():
            if tile <= tile_budget and lengths[0] <= token_budget:
                length = lengths[bisect_right(lengths, token_budget) - 1]
                if best is None or (length, tile) > (best[1], best[0]):
                    best = (tile, length)
        return best

    def closing(self, room: int, room_tiles: int, draw: Callable[[], float]) -> list[tuple[int, int]]:
        """Samples that fill the rest of a row well: the best of some drawn sets, each ended by the longest that fits.

        Among sets that fill equally well the one of fewer samples: short ones are what later rows are closed with.
        """
        best: list[tuple[int, int]] = []
        best_key = (0, 0)
        good_enough = room - room // _CLOSE_ENOUGH
        kinds = list(self.lengths)
        for attempt in range(_SETS_TRIED):
            chosen: list[tuple[int, int]] = []
            left, left_tiles = room, room_tiles
            while (longest := self.longest(left, left_tiles)) is not None:
                kind = longest
                if attempt and left > longest[1] + 1:
                    tile = kinds[int(draw() * len(kinds))]
                    lengths = self.lengths[tile]
                    drawn = (tile, lengths[int(draw() * len(lengths))])
                    if drawn[1] <= left and tile <= left_tiles:
                        kind = drawn
                if chosen.count(kind) >= len(self._numbers[kind]):
                    break
                chosen.append(kind)
                left, left_tiles = left - kind[1], left_tiles - kind[0]
            key = (room - left, -len(chosen))
            if key > best_key:
                best, best_key = chosen, key
            if best_key[0] >= good_enough:
                break
        return best


def pack_window(
    tokens: np.ndarray, tiles: np.ndarray, seq_length: int, max_tiles: int, rng: np.random.Generator
) -> list[list[int]]:
    """Share samples out to rows.

    Each row begins with the longest sample left, so that the hard ones are placed while small ones remain to go with
    them; takes samples as they come while there is ample room, so that the mix of lengths stays what it is to the
    end; and is closed by the set that fills it best of some that are tried.

    Args:
        tokens: [n] of each sample, at most `seq_length`.
        tiles: [n] of each sample, at most `max_tiles`.
        seq_length: tokens a row may have.
        max_tiles: tiles a row may have.
        rng: decides among samples that fit alike.

    Returns:
        Rows of sample numbers, each number in exactly one row.
    """
    remaining = _Remaining(tokens, tiles)
    draw = random.Random(int(rng.integers(1 << 62))).random
    order = rng.permutation(len(tokens))
    stream = iter(zip(tiles[order].tolist(), tokens[order].tolist(), strict=True))
    coming = next(stream, None)
    rows = []
    while remaining.count:
        longest = remaining.longest(seq_length, max_tiles)
        assert longest is not None, "a sample is longer than a row"
        row = [remaining.take(*longest)]
        room, room_tiles = seq_length - longest[1], max_tiles - longest[0]
        ample = _AMPLE * longest[1]
        while room > ample and coming is not None:
            if not remaining.has(*coming):
                coming = next(stream, None)
                continue
            if coming[0] > room_tiles:
                break
            row.append(remaining.take(*coming))
            room, room_tiles = room - coming[1], room_tiles - coming[0]
            coming = next(stream, None)
        while closing := remaining.closing(room, room_tiles, draw):
            for kind in closing:
                row.append(remaining.take(*kind))
                room, room_tiles = room - kind[1], room_tiles - kind[0]
        rows.append(row)
    return rows


def order_rows(rows: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """The order in which a window's rows come, and that of the samples in each: both shuffled."""
    return [rng.permutation(rows[place]).tolist() for place in rng.permutation(len(rows))]


@dataclass
class EpochPlan:
    """The rows of one epoch."""

    row_starts: np.ndarray
    """[rows + 1] int64: row r has the members row_starts[r] to row_starts[r + 1]."""
    members: np.ndarray
    """[samples] int64: sample numbers, row after row."""
    fill: float
    """Tokens over places, 0 to 1."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Sample numbers of a row."""
        return self.members[self.row_starts[index] : self.row_starts[index + 1]]


@dataclass
class Budget:
    """What a row holds at most, and how many samples are packed together."""

    seq_length: int
    max_tiles: int
    window: int


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
    windows = np.array_split(samples, max(-(-len(samples) // budget.window), 1))
    starts, members = [0], []
    for number, window in enumerate(windows):
        rng = np.random.default_rng([seed, epoch, number])
        rows = pack_window(tokens[window], tiles[window], budget.seq_length, budget.max_tiles, rng)
        for row in order_rows(rows, rng):
            starts.append(starts[-1] + len(row))
            members.append(window[row])
    flat = np.concatenate(members) if members else np.empty(0, np.int64)
    places = max((len(starts) - 1) * budget.seq_length, 1)
    return EpochPlan(np.asarray(starts, np.int64), flat, float(tokens[flat].sum(dtype=np.int64)) / places)


@dataclass
class PlannedRow:
    """One row to be built."""

    counter: int
    """Rows consumed before it since the start of training."""
    epoch: int
    members: np.ndarray
    """[documents] int64: sample numbers"""


class RowPlan:
    """All rows of a training run, epoch after epoch without end, addressed by one counter."""

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
    def fill(self) -> float:
        """Tokens over places of the current epoch, 0 to 1."""
        return self.current.fill

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch != self._epoch:
            plan = self._plan_of_epoch(epoch)
            if not plan.rows:
                raise DataError("the dataset is empty: no sample is left to train on")
            if epoch == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + plan.rows)
            self.current, self._epoch = plan, epoch
        return self.current

    def row(self, counter: int) -> PlannedRow:
        """The row that comes after `counter` others."""
        while counter >= self._ends[-1]:
            self._plan(len(self._ends))
        epoch = bisect_right(self._ends, counter)
        start = self._ends[epoch - 1] if epoch else 0
        return PlannedRow(counter, epoch, self._plan(epoch).row(counter - start))

    def share(self, consumed_rows: int, rank: int, size: int) -> Iterator[PlannedRow]:
        """Every size-th row from `consumed_rows` + `rank` on, for ever: what one of `size` data ranks reads."""
        counter = consumed_rows + rank
        while True:
            yield self.row(counter)
            counter += size
