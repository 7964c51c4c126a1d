"""Balanced packing: rows that are full and cost the same.

1. Distribute the samples over rows of about equal tokens (`distribution.py`).
2. Exchange samples. Rows are paired, the most different first. Each pair swaps the two samples that bring both rows
   nearest to the mean; budgets come first. Empty slots count as samples of length 0, so a swap can also move a sample.
3. Remove the samples that still exceed a budget, insert them where there is room, and pack the rest into more rows.

All rows are processed at once in numpy. Sums are of whole numbers wherever the order of additions could matter, so
every machine computes the same rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_vlm.data.packing.distribution import Lengths, distribute

_ROUNDS, _PATIENCE = 48, 3
"""Maximum number of rounds of swaps, and the number of consecutive rounds with few gains that ends them."""
_LAST_ROUNDS, _LAST_PATIENCE = 384, 24
"""The same when only rows over a budget are left. They are few, and another row would cost more than many rounds."""
_CANDIDATES = 16
"""Slots of a row that a round considers."""
_BALANCED = 0.003
"""Rows with a smaller relative distance from the mean are only changed to improve another row."""
_GAIN = 0.7
"""A swap is a gain if it multiplies the penalty of its pair by less than this."""
_MIN_GAINS = 0.03
"""A round has few gains if there are at most this many per row."""
_PAIRS_AT_ONCE = 512
"""Pairs of rows that are evaluated together, so that intermediate arrays fit a core's cache."""


def balance_rows(lengths: Lengths, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pack samples into rows of equal cost within both budgets.

    Args:
        lengths: of all samples.
        samples: [n] numbers of the samples to pack; of samples of equal length, the earlier one is distributed first.
        rng: for the pairs of rows.

    Returns:
        [rows, slots] int64: each sample number once, `lengths.empty` elsewhere. No row is empty.
    """
    rows, changed = np.empty((0, 1), np.int64), False
    while len(samples):
        new_rows = distribute(lengths, samples)
        _Exchange(lengths, new_rows, rng).run()
        new_rows, removed = _remove_excess(lengths, new_rows)
        rows = _stack([rows, new_rows], lengths.empty)
        samples = _insert(lengths, rows, removed)
        changed |= len(removed) > 0
    if changed:
        _Exchange(lengths, rows, rng).run()
    return rows[(rows != lengths.empty).any(1)]


def _stack(tables: list[np.ndarray], empty: int) -> np.ndarray:
    width = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=empty) for t in tables])


class _Exchange:
    """Swaps samples between the rows of a table, in place."""

    def __init__(self, lengths: Lengths, rows: np.ndarray, rng: np.random.Generator) -> None:
        self.lengths, self.rows, self.rng = lengths, rows, rng
        self.tokens, self.tiles, self.cost = (
            values[rows].sum(1) for values in (lengths.tokens, lengths.tiles, lengths.cost)
        )
        count = max(len(rows), 1)
        self.mean_tokens = np.float32(int(self.tokens.sum(dtype=np.int64)) / count)
        self.mean_cost = np.float32(max(int(self.cost.sum(dtype=np.int64)) / count, 1.0))

    def penalty(self, tokens: np.ndarray, tiles: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """What swaps minimise: squared relative distances from the mean, and 100 times the excess."""
        cost_distance = (cost - self.mean_cost) / self.mean_cost
        token_distance = (tokens - self.mean_tokens) / np.float32(self.lengths.seq_length)
        distance = cost_distance * cost_distance + token_distance * token_distance * np.float32(0.3)
        return distance + self.excess(tokens, tiles) * np.float32(100)

    def excess(self, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """By how much rows exceed their budgets, relative to the budgets."""
        seq_length, max_tiles = np.float32(self.lengths.seq_length), np.float32(self.lengths.max_tiles)
        excess_tokens = np.maximum(tokens - seq_length, 0) / seq_length
        return excess_tokens + np.maximum(tiles - max_tiles, 0) / np.maximum(max_tiles, np.float32(1))

    def run(self) -> None:
        """Swap until all rows are balanced or there are few gains, then the same until no row exceeds a budget."""
        if len(self.rows) < 2 or self._rounds(_ROUNDS, _PATIENCE, _MIN_GAINS, lambda penalty: penalty > _BALANCED**2):
            return
        self._rounds(_LAST_ROUNDS, _LAST_PATIENCE, 0, lambda penalty: self.excess(self.tokens, self.tiles) > 0)

    def _rounds(self, rounds: int, patience: int, min_gains: float, select: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Rounds of swaps in the pairs that hold a row to improve, which `select` finds from the penalties of all rows.

        Returns whether no row is left to improve.
        """
        rounds_without = 0
        for number in range(rounds):
            penalty = self.penalty(self.tokens, self.tiles, self.cost)
            selected = select(penalty)
            if not selected.any():
                return True
            a, b = self._pairs(number % 3, penalty)
            useful = selected[a] | selected[b]
            gains = self._swap(a[useful], b[useful], penalty)
            rounds_without = 0 if gains > min_gains * len(self.rows) else rounds_without + 1
            if rounds_without == patience:
                break
        return False

    def _pairs(self, kind: int, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pair each row at most once: 0: expensive with cheap; 1: long with short; 2: highest penalties with others."""
        half = len(self.rows) // 2
        if kind == 2:
            worst = np.argsort(-penalty, kind="stable")
            return worst[:half], self.rng.permutation(worst[half : 2 * half])
        key = (
            (self.cost - self.mean_cost) / self.mean_cost + (self.tokens - self.mean_tokens) / self.lengths.seq_length
            if kind == 0
            else self.tokens + np.maximum(self.tiles - self.lengths.max_tiles, 0) * np.float32(self.lengths.seq_length)
        )
        order = np.argsort(key, kind="stable")
        return order[:half], order[::-1][:half]

    def _swap(self, a: np.ndarray, b: np.ndarray, penalty: np.ndarray) -> int:
        """Make the best swap of each pair of rows, if it lowers their penalty. Returns the number of gains."""
        width = self.rows.shape[1]
        slots = [
            np.arange(width) if width <= _CANDIDATES else self.rng.permutation(width)[:_CANDIDATES] for _ in range(2)
        ]
        chunks = (slice(start, start + _PAIRS_AT_ONCE) for start in range(0, len(a), _PAIRS_AT_ONCE))
        return sum(self._swap_chunk(a[chunk], b[chunk], slots, penalty) for chunk in chunks)

    def _swap_chunk(self, a: np.ndarray, b: np.ndarray, slots: list[np.ndarray], penalty: np.ndarray) -> int:
        """The same for some of the pairs, with the candidates in slots[0] of rows a and slots[1] of rows b."""
        lengths, sums = self.lengths, (self.tokens, self.tiles, self.cost)
        in_a, in_b = self.rows[np.ix_(a, slots[0])], self.rows[np.ix_(b, slots[1])]
        # [pairs, candidates of a, candidates of b]: what each swap adds to row a
        added = [
            values[in_b][:, None, :] - values[in_a][:, :, None]
            for values in (lengths.tokens, lengths.tiles, lengths.cost)
        ]
        after = self.penalty(*(now[a][:, None, None] + change for now, change in zip(sums, added, strict=True)))
        after += self.penalty(*(now[b][:, None, None] - change for now, change in zip(sums, added, strict=True)))
        flat = after.reshape(len(a), -1)
        best = flat.argmin(1)
        before, lowest = penalty[a] + penalty[b], np.take_along_axis(flat, best[:, None], 1)[:, 0]
        slot_a, slot_b = np.unravel_index(best, after.shape[1:])
        pairs = np.arange(len(a))
        allowed = self._keeps_budgets(a, b, *(change[pairs, slot_a, slot_b] for change in added[:2]))
        pair = np.flatnonzero((lowest < before) & allowed)
        slot_a, slot_b = slot_a[pair], slot_b[pair]
        self.rows[a[pair], slots[0][slot_a]] = in_b[pair, slot_b]
        self.rows[b[pair], slots[1][slot_b]] = in_a[pair, slot_a]
        for now, change in zip(sums, added, strict=True):
            moved = change[pair, slot_a, slot_b]
            now[a[pair]] += moved
            now[b[pair]] -= moved
        return int((allowed & (lowest < before * np.float32(_GAIN))).sum())

    def _keeps_budgets(self, a: np.ndarray, b: np.ndarray, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Whether the excess of rows a and b does not grow when `tokens` and `tiles` move from b to a."""
        before = self.excess(self.tokens[a], self.tiles[a]) + self.excess(self.tokens[b], self.tiles[b])
        after = self.excess(self.tokens[a] + tokens, self.tiles[a] + tiles)
        return after + self.excess(self.tokens[b] - tokens, self.tiles[b] - tiles) <= before


def _remove_excess(lengths: Lengths, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove samples from rows over a budget: the smallest one that suffices, or else the longest.

    Returns (rows, removed samples).
    """
    removed: list[np.ndarray] = []
    while True:
        tokens, tiles = lengths.tokens[rows], lengths.tiles[rows]
        excess, excess_tiles = tokens.sum(1) - lengths.seq_length, tiles.sum(1) - lengths.max_tiles
        over = np.flatnonzero((excess > 0) | (excess_tiles > 0))
        if not len(over):
            return rows, np.concatenate([np.empty(0, np.int64), *removed])
        tokens, tiles = tokens[over], tiles[over]
        suffices = (tokens >= excess[over, None]) & (tiles >= excess_tiles[over, None])
        smallest = np.where(suffices, tokens, np.inf).argmin(1)
        slot = np.where(suffices.any(1), smallest, (tokens + tiles).argmax(1))
        removed.append(rows[over, slot])
        rows[over, slot] = lengths.empty


def _insert(lengths: Lengths, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Insert samples into empty slots of rows with room, in place. Returns the samples that fit nowhere."""
    while len(samples):
        room, row_tiles = lengths.seq_length - lengths.tokens[rows].sum(1), lengths.tiles[rows].sum(1)
        room[(rows != lengths.empty).all(1)] = -1
        by_room = np.argsort(room, kind="stable")
        samples = samples[np.argsort(lengths.tokens[samples], kind="stable")]
        # By bisection: the largest number of the shortest samples that fit, in order, into as many rows with most room.
        count, too_many = 0, min(len(samples), len(rows)) + 1
        while too_many - count > 1:
            middle = (count + too_many) // 2
            if (lengths.tokens[samples[:middle]] <= room[by_room[-middle:]]).all():
                count = middle
            else:
                too_many = middle
        chosen = by_room[len(rows) - count :]
        fits = row_tiles[chosen] + lengths.tiles[samples[:count]] <= lengths.max_tiles
        if not fits.any():
            break
        slot = (rows[chosen] == lengths.empty).argmax(1)
        rows[chosen[fits], slot[fits]] = samples[:count][fits]
        samples = np.concatenate([samples[:count][~fits], samples[count:]])
    return samples
