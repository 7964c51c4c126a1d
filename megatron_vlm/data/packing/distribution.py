"""First step of packing: distribute samples over rows of about equal tokens.

Samples go, from the longest to the shortest, each to one of the emptiest rows, a block of rows at a time (longest
processing time first; Graham, "Bounds on multiprocessing timing anomalies", 1969). There are only as many rows as the
samples need if all rows are full, so balanced rows are full rows. Budgets may be exceeded by little: `exchange.py`
corrects this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_OVERFILL = 1.1
"""A row may exceed a budget by this factor."""
_BLOCKS = 8
"""The emptiest 1 / 8 of the rows gets one sample each at a time."""
_MAX_PER_ROW = 64
"""Largest number of samples in a row that `min_rows` distinguishes."""
_SPARE_SLOTS = 2
"""Empty slots that the row with most samples starts with."""


@dataclass
class Lengths:
    """Lengths of the n samples to pack, and the budgets of a row. The last entry, 0, stands for an empty slot."""

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
        """The sample number that stands for an empty slot."""
        return len(self.tokens) - 1


def min_rows(tokens: np.ndarray, tiles: np.ndarray, seq_length: int, max_tiles: int) -> int:
    """A lower bound, at least 1, on the number of rows of any packing.

    Tokens and tiles need as many rows as they fill. Of samples larger than 1 / (m + 1) of a row at most m share a row,
    for every m.

    Args:
        tokens: [n] whole numbers, none above seq_length.
        tiles: [n] whole numbers, none above max_tiles.
        seq_length: maximum number of tokens of a row.
        max_tiles: maximum number of tiles of a row.
    """
    bound = 1
    for sizes, budget in ((tokens[tokens > 0], seq_length), (tiles[tiles > 0], max_tiles)):
        full_rows = -(-int(sizes.sum()) // max(budget, 1))
        # large[m]: number of samples of which at most m fit into a row
        large = np.cumsum(np.bincount(np.minimum(budget // sizes, _MAX_PER_ROW), minlength=_MAX_PER_ROW + 1))
        m = np.arange(1, _MAX_PER_ROW)
        bound = max(bound, full_rows, int((-(-large[1:-1] // m)).max()))
    return bound


def distribute(lengths: Lengths, samples: np.ndarray) -> np.ndarray:
    """Distribute samples over rows. Those that fit into none are distributed over more rows in the same way.

    Args:
        lengths: of all samples.
        samples: [n] numbers of the samples; of samples of equal length, the earlier one is distributed first.

    Returns:
        [rows, slots] int64: each sample number once, `lengths.empty` elsewhere.
    """
    remaining = samples[np.argsort(-lengths.tokens[samples], kind="stable")]
    row_of_sample, placed, rows = [], [], 0
    while len(remaining):
        tokens, tiles = lengths.tokens[remaining].astype(np.int64), lengths.tiles[remaining].astype(np.int64)
        count = min_rows(tokens, tiles, lengths.seq_length, lengths.max_tiles)
        row = _distribute_once(tokens, tiles, count, lengths)
        row_of_sample.append(row[row >= 0] + rows)
        placed.append(remaining[row >= 0])
        rows += count
        remaining = remaining[row < 0]
    return _table(np.concatenate(row_of_sample), np.concatenate(placed), rows, lengths.empty)


def _distribute_once(tokens: np.ndarray, tiles: np.ndarray, rows: int, lengths: Lengths) -> np.ndarray:
    """[n] row of each sample, -1 if it does not fit. `tokens` is descending."""
    max_tokens, max_tiles = int(lengths.seq_length * _OVERFILL), int(lengths.max_tiles * _OVERFILL)
    row_tokens, row_tiles = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    row_of_sample = np.full(len(tokens), -1, np.int64)
    block, row_index = max(rows // _BLOCKS, 1), np.arange(rows)
    for start in range(0, len(tokens), block):
        chunk = slice(start, min(start + block, len(tokens)))
        key = row_tokens * rows + row_index  # keys are unique, so every sorting algorithm gives the same order
        emptiest = np.argpartition(key, block - 1)[:block] if block < rows else row_index
        emptiest = emptiest[np.argsort(key[emptiest])][: chunk.stop - start]
        fits = (row_tokens[emptiest] + tokens[chunk] <= max_tokens) & (row_tiles[emptiest] + tiles[chunk] <= max_tiles)
        row_of_sample[chunk] = np.where(fits, emptiest, -1)
        row_tokens[emptiest] += np.where(fits, tokens[chunk], 0)
        row_tiles[emptiest] += np.where(fits, tiles[chunk], 0)
    return row_of_sample


def _table(row_of_sample: np.ndarray, samples: np.ndarray, rows: int, empty: int) -> np.ndarray:
    """[rows, slots] sample numbers, from the row of each sample."""
    order = np.argsort(row_of_sample, kind="stable")
    counts = np.bincount(row_of_sample, minlength=rows)
    slot = np.arange(len(row_of_sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((rows, int(counts.max()) + _SPARE_SLOTS), empty, np.int64)
    table[row_of_sample[order], slot] = samples[order]
    return table
