"""The order in which an epoch's samples come: shuffled, and yet such that a bounded cache of shards suffices.

Samples of an annotation file or of few shards are shuffled freely. Samples of many shards are not: one after the other
from all over a remote set, each would fetch a shard. So shards are shuffled, and samples within a window of some
shards: a shard is fetched once in an epoch, as long as the cache holds the windows in use. The order is the same
wherever the shards are.
"""

from __future__ import annotations

import numpy as np

SHARDS_PER_WINDOW = 16
"""Shards of one set that samples are shuffled over. At 64 MiB a shard, 1 GiB of cache for each set of a mixture."""


def spread(drawn: np.ndarray, shard_starts: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """When each sample drawn from a source comes, as a part of the epoch.

    A sample drawn k times from many shards comes once in each of k passes, one after the other.

    Args:
        drawn: [n] indices into one source, some perhaps more than once.
        shard_starts: [shards + 1] first sample of each shard, and the end; None: the source has no shards.
        rng: this use's, this epoch's.

    Returns:
        [n] float64 in [0, 1)
    """
    if shard_starts is None or len(shard_starts) <= SHARDS_PER_WINDOW + 1 or not len(drawn):
        return rng.random(len(drawn))
    shards = np.searchsorted(shard_starts, drawn, side="right") - 1
    passes = _occurrence(drawn)
    turns = np.stack([rng.permutation(len(shard_starts) - 1) for _ in range(int(passes.max()) + 1)])
    windows = turns[passes, shards] // SHARDS_PER_WINDOW
    order = np.lexsort((rng.random(len(drawn)), windows, passes))
    times = np.empty(len(drawn))
    times[order] = (np.arange(len(drawn)) + rng.random(len(drawn))) / len(drawn)
    return times


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    places = np.arange(len(values))
    first = np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]])
    out = np.empty(len(values), np.int64)
    out[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return out
