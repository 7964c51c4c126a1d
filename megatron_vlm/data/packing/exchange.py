"""Rows that are full and cost the same: samples are dealt out evenly, then exchanged between rows.

Dealing takes samples from the longest to the shortest and gives each to one of the emptiest rows, a block of them at a
time (longest processing time first; Graham, "Bounds on multiprocessing timing anomalies", 1969). There are only as
many rows as full ones hold the samples, so even rows are full rows. Exchanging then pairs rows, far from alike first,
and swaps in each pair the two samples that bring both rows nearest to the mean, budgets before all else; free places
take part as samples of no length, so that a swap can be a move. What still exceeds a budget is taken out, put where
there is room, and what is left then is dealt to further rows in the same way.

Everything is done to all rows at once in numpy, and in whole numbers where the order of additions could matter, so
that every machine finds the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_OVER = 1.1
"""Dealing may exceed a budget by this: swaps put it right."""
_BLOCKS = 8
"""Parts of the rows that are dealt to at a time: the emptiest eighth."""
_SHARE_A_ROW = 64
"""As many samples share a row at most, or their number does not matter when rows are counted."""
_SWAPS, _IDLE = 48, 3
"""Rounds of swaps at most, and so many in a row that bring little."""
_LAST_SWAPS, _LAST_IDLE = 384, 24
"""The same when only rows beyond a budget are left, which are few: one more row would cost more than to look on."""
_CANDIDATES = 16
"""Places of a row that a round looks at."""
_SPARE = 2
"""Free places that the fullest row begins with."""
_EVEN = 0.003
"""A row this near to the mean is left alone, unless to help another."""
_GAIN = 0.7
"""A swap that leaves less than this part of a pair's distance from even is a gain."""
_GAINS_AT_LEAST = 0.03
"""When rounds bring gains to less than this part of the rows, only rows beyond a budget go on."""
_AT_ONCE = 512
"""Pairs of rows that are looked at together: what is worked out for them stays in a core's cache."""


@dataclass
class Lengths:
    """Samples to be shared out, and what a row holds. A last entry of nothing stands for a free place."""

    tokens: np.ndarray
    """[n + 1] float32, whole numbers"""
    tiles: np.ndarray
    """[n + 1] float32, whole numbers"""
    cost: np.ndarray
    """[n + 1] float32, whole numbers"""
    seq_length: int
    max_tiles: int

    @classmethod
    def of(cls, tokens: np.ndarray, tiles: np.ndarray, cost: np.ndarray, seq_length: int, max_tiles: int) -> Lengths:
        """From arrays of n samples, none of which exceeds a budget."""
        tokens, tiles, cost = (np.append(values, 0).astype(np.float32) for values in (tokens, tiles, cost))
        return cls(tokens, tiles, cost, seq_length, max_tiles)

    @property
    def empty(self) -> int:
        """The number that stands for a free place."""
        return len(self.tokens) - 1


def min_rows(tokens: np.ndarray, tiles: np.ndarray, seq_length: int, max_tiles: int) -> int:
    """A number of rows, at least one, that no packing of samples can go below.

    Tokens and tiles need as many rows as they fill; and of samples larger than the (m + 1)-th part of a row at most m
    share one, for every m.

    Args:
        tokens: [n] whole numbers, none above seq_length.
        tiles: [n] whole numbers, none above max_tiles.
        seq_length: tokens of a row.
        max_tiles: tiles of a row.
    """
    least = 1
    for sizes, most in ((tokens[tokens > 0], seq_length), (tiles[tiles > 0], max_tiles)):
        fill = -(-int(sizes.sum()) // max(most, 1))
        # How many samples go at most 1, 2, 3, … times into a row; as many at most share it.
        sharing = np.cumsum(np.bincount(np.minimum(most // sizes, _SHARE_A_ROW), minlength=_SHARE_A_ROW + 1))
        m = np.arange(1, _SHARE_A_ROW)
        least = max(least, fill, int((-(-sharing[1:-1] // m)).max()))
    return least


def balance_rows(lengths: Lengths, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share samples out to rows of equal cost within both budgets.

    Args:
        lengths: of all samples.
        samples: [n] those to share out; among equals, the earlier ones come first.
        rng: decides which rows are paired.

    Returns:
        [rows, places] int64: each sample number once, `lengths.empty` where there is none. No row is empty.
    """
    rows, changed = np.empty((0, 1), np.int64), False
    while len(samples):
        dealt = _deal(lengths, samples)
        _Exchange(lengths, dealt, rng).run()
        dealt, taken = _within_budgets(lengths, dealt)
        rows = _stack([rows, dealt], lengths.empty)
        samples = _put_back(lengths, rows, taken)
        changed |= len(taken) > 0
    if changed:
        _Exchange(lengths, rows, rng).run()
    return rows[(rows != lengths.empty).any(1)]


def _stack(parts: list[np.ndarray], free: int) -> np.ndarray:
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=free) for p in parts])


def _deal(lengths: Lengths, samples: np.ndarray) -> np.ndarray:
    """Rows of about equal tokens, budgets exceeded by little; samples that fit nowhere get rows of their own kind."""
    left = samples[np.argsort(-lengths.tokens[samples], kind="stable")]
    owners, placed, rows = [], [], 0
    while len(left):
        tokens, tiles = lengths.tokens[left].astype(np.int64), lengths.tiles[left].astype(np.int64)
        count = min_rows(tokens, tiles, lengths.seq_length, lengths.max_tiles)
        owner = _deal_round(tokens, tiles, count, lengths)
        owners.append(owner[owner >= 0] + rows)
        placed.append(left[owner >= 0])
        rows += count
        left = left[owner < 0]
    return _table(np.concatenate(owners), np.concatenate(placed), rows, lengths.empty)


def _deal_round(tokens: np.ndarray, tiles: np.ndarray, rows: int, lengths: Lengths) -> np.ndarray:
    """Row of each sample, -1 where none has room; tokens are descending."""
    most, most_tiles = int(lengths.seq_length * _OVER), int(lengths.max_tiles * _OVER)
    load, load_tiles = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    owner = np.full(len(tokens), -1, np.int64)
    block, number = max(rows // _BLOCKS, 1), np.arange(rows)
    for start in range(0, len(tokens), block):
        dealt = slice(start, min(start + block, len(tokens)))
        key = load * rows + number  # no two alike, so that any way of sorting gives the same
        emptiest = np.argpartition(key, block - 1)[:block] if block < rows else number
        emptiest = emptiest[np.argsort(key[emptiest])][: dealt.stop - start]
        fits = (load[emptiest] + tokens[dealt] <= most) & (load_tiles[emptiest] + tiles[dealt] <= most_tiles)
        owner[dealt] = np.where(fits, emptiest, -1)
        load[emptiest] += np.where(fits, tokens[dealt], 0)
        load_tiles[emptiest] += np.where(fits, tiles[dealt], 0)
    return owner


def _table(owner: np.ndarray, samples: np.ndarray, rows: int, free: int) -> np.ndarray:
    """[rows, places] from the row of each sample."""
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=rows)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((rows, int(counts.max()) + _SPARE), free, np.int64)
    table[owner[order], place] = samples[order]
    return table


class _Exchange:
    """Swaps of samples between the rows of a table, in place."""

    def __init__(self, lengths: Lengths, rows: np.ndarray, rng: np.random.Generator) -> None:
        self.lengths, self.rows, self.rng = lengths, rows, rng
        self.tokens, self.tiles, self.cost = (
            values[rows].sum(1) for values in (lengths.tokens, lengths.tiles, lengths.cost)
        )
        count = max(len(rows), 1)
        self.mean_tokens = np.float32(int(self.tokens.sum(dtype=np.int64)) / count)
        self.mean_cost = np.float32(max(int(self.cost.sum(dtype=np.int64)) / count, 1.0))

    def badness(self, tokens: np.ndarray, tiles: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """How far rows are from what they should be: squares of distances from the mean; beyond a budget, far more."""
        off = (cost - self.mean_cost) / self.mean_cost
        uneven = (tokens - self.mean_tokens) / np.float32(self.lengths.seq_length)
        return off * off + uneven * uneven * np.float32(0.3) + self.excess(tokens, tiles) * np.float32(100)

    def excess(self, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """By how much rows exceed their budgets, as parts of them."""
        seq_length, max_tiles = np.float32(self.lengths.seq_length), np.float32(self.lengths.max_tiles)
        over = np.maximum(tokens - seq_length, 0) / seq_length
        return over + np.maximum(tiles - max_tiles, 0) / np.maximum(max_tiles, np.float32(1))

    def run(self) -> None:
        """Swap until rows are even, or swaps help no more; then until none exceeds a budget, or swaps help no more."""
        even = len(self.rows) < 2 or self._rounds(_SWAPS, _IDLE, _GAINS_AT_LEAST, lambda bad: bad > _EVEN**2)
        if not even:
            self._rounds(_LAST_SWAPS, _LAST_IDLE, 0, lambda bad: self.excess(self.tokens, self.tiles) > 0)

    def _rounds(
        self, swaps: int, patience: int, gains_at_least: float, want: Callable[[np.ndarray], np.ndarray]
    ) -> bool:
        """Rounds of swaps in pairs of which one row is wanted, given how bad rows are.

        Returns whether none is wanted any more.
        """
        idle = 0
        for number in range(swaps):
            bad = self.badness(self.tokens, self.tiles, self.cost)
            wanted = want(bad)
            if not wanted.any():
                return True
            ours, theirs = self._pairs(number % 3, bad)
            worth = wanted[ours] | wanted[theirs]
            gains = self._swap(ours[worth], theirs[worth], bad)
            idle = 0 if gains > gains_at_least * len(self.rows) else idle + 1
            if idle == patience:
                break
        return False

    def _pairs(self, kind: int, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint sets of rows: dear with cheap, long with short, or the worst with any."""
        half = len(self.rows) // 2
        if kind == 2:
            worst = np.argsort(-bad, kind="stable")
            return worst[:half], self.rng.permutation(worst[half : 2 * half])
        key = (
            (self.cost - self.mean_cost) / self.mean_cost + (self.tokens - self.mean_tokens) / self.lengths.seq_length
            if kind == 0
            else self.tokens + np.maximum(self.tiles - self.lengths.max_tiles, 0) * np.float32(self.lengths.seq_length)
        )
        order = np.argsort(key, kind="stable")
        return order[:half], order[::-1][:half]

    def _swap(self, ours: np.ndarray, theirs: np.ndarray, bad: np.ndarray) -> int:
        """The best swap in each pair of rows, if it betters them. Returns the number of gains."""
        width = self.rows.shape[1]
        drawn = [
            np.arange(width) if width <= _CANDIDATES else self.rng.permutation(width)[:_CANDIDATES] for _ in range(2)
        ]
        parts = range(0, len(ours), _AT_ONCE)
        return sum(self._swap_some(ours[i : i + _AT_ONCE], theirs[i : i + _AT_ONCE], drawn, bad) for i in parts)

    def _swap_some(self, ours: np.ndarray, theirs: np.ndarray, drawn: list[np.ndarray], bad: np.ndarray) -> int:
        """The same for some of the pairs, looking at the places `drawn` of our rows and of theirs."""
        lengths = self.lengths
        mine, other = self.rows[np.ix_(ours, drawn[0])], self.rows[np.ix_(theirs, drawn[1])]
        # [pairs, my candidates, their candidates]: what my row gains by each swap
        gains = [
            values[other][:, None, :] - values[mine][:, :, None]
            for values in (lengths.tokens, lengths.tiles, lengths.cost)
        ]
        sums = (self.tokens, self.tiles, self.cost)
        after = self.badness(*(now[ours][:, None, None] + gain for now, gain in zip(sums, gains, strict=True)))
        after += self.badness(*(now[theirs][:, None, None] - gain for now, gain in zip(sums, gains, strict=True)))
        flat = after.reshape(len(ours), -1)
        best = flat.argmin(1)
        before, least = bad[ours] + bad[theirs], np.take_along_axis(flat, best[:, None], 1)[:, 0]
        mine_place, other_place = np.unravel_index(best, after.shape[1:])
        each = np.arange(len(ours))
        held = self._hold_budgets(ours, theirs, *(gain[each, mine_place, other_place] for gain in gains[:2]))
        pair = np.flatnonzero((least < before) & held)
        mine_place, other_place = mine_place[pair], other_place[pair]
        self.rows[ours[pair], drawn[0][mine_place]] = other[pair, other_place]
        self.rows[theirs[pair], drawn[1][other_place]] = mine[pair, mine_place]
        for now, gain in zip(sums, gains, strict=True):
            moved = gain[pair, mine_place, other_place]
            now[ours[pair]] += moved
            now[theirs[pair]] -= moved
        return int((held & (least < before * np.float32(_GAIN))).sum())

    def _hold_budgets(self, a: np.ndarray, b: np.ndarray, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Whether rows a and b exceed their budgets by no more than now when a gains so much from b."""
        now = self.excess(self.tokens[a], self.tiles[a]) + self.excess(self.tokens[b], self.tiles[b])
        then = self.excess(self.tokens[a] + tokens, self.tiles[a] + tiles)
        return then + self.excess(self.tokens[b] - tokens, self.tiles[b] - tiles) <= now


def _within_budgets(lengths: Lengths, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take samples out of rows that exceed a budget: the smallest that is enough, or the longest.

    Returns (rows, samples taken out).
    """
    taken: list[np.ndarray] = []
    while True:
        tokens, tiles = lengths.tokens[rows], lengths.tiles[rows]
        over, over_tiles = tokens.sum(1) - lengths.seq_length, tiles.sum(1) - lengths.max_tiles
        wrong = np.flatnonzero((over > 0) | (over_tiles > 0))
        if not len(wrong):
            return rows, np.concatenate([np.empty(0, np.int64), *taken])
        tokens, tiles = tokens[wrong], tiles[wrong]
        enough = (tokens >= over[wrong, None]) & (tiles >= over_tiles[wrong, None])
        place = np.where(enough.any(1), np.where(enough, tokens, np.inf).argmin(1), (tokens + tiles).argmax(1))
        taken.append(rows[wrong, place])
        rows[wrong, place] = lengths.empty


def _put_back(lengths: Lengths, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Put samples into the free places of rows that have room, in place. Returns those that fit nowhere."""
    while len(samples):
        room, room_tiles = lengths.seq_length - lengths.tokens[rows].sum(1), lengths.tiles[rows].sum(1)
        room[(rows != lengths.empty).all(1)] = -1
        by_room = np.argsort(room, kind="stable")
        samples = samples[np.argsort(lengths.tokens[samples], kind="stable")]
        # As many of the shortest as fit, each in its turn, into as many of the emptiest rows.
        fewest, beyond = 0, min(len(samples), len(rows)) + 1
        while beyond - fewest > 1:
            count = (fewest + beyond) // 2
            if (lengths.tokens[samples[:count]] <= room[by_room[-count:]]).all():
                fewest = count
            else:
                beyond = count
        chosen = by_room[len(rows) - fewest :]
        fits = room_tiles[chosen] + lengths.tiles[samples[:fewest]] <= lengths.max_tiles
        if not fits.any():
            break
        place = (rows[chosen] == lengths.empty).argmax(1)
        rows[chosen[fits], place[fits]] = samples[:fewest][fits]
        samples = np.concatenate([samples[:fewest][~fits], samples[fewest:]])
    return samples
