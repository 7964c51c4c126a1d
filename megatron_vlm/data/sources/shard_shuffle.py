"""Shuffles the samples of an epoch so that a bounded cache of shards suffices.

Samples of an annotation file or of few shards are shuffled uniformly. In a set of many shards, that would fetch a shard
for nearly every sample. There the shards are shuffled, and the samples are shuffled within a window of shards, so that
each shard is fetched once per epoch as long as the cache holds the windows in use. The order does not depend on where
the shards are stored.
"""

from __future__ import annotations

import numpy as np

SHARDS_PER_WINDOW = 16
"""With 64 MiB per shard, a window is 1 GiB of cache for each shard set of a mixture."""


def shuffle_keys(indices: np.ndarray, shard_starts: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Sort keys of the selected samples of a source. A key is the position in the epoch as a fraction of it.

    If a sample of a set of many shards is selected k times, it occurs once in each of k consecutive passes over the
    set.

    Args:
        indices: [n] indices into the source, possibly with repetitions.
        shard_starts: [shards + 1] index of the first sample of each shard, and the end; None: the source has no shards.
        rng: of this mixture entry and epoch.

    Returns:
        [n] float64 in [0, 1)
    """
    if shard_starts is None or len(shard_starts) <= SHARDS_PER_WINDOW + 1 or not len(indices):
        return rng.random(len(indices))
    shards = np.searchsorted(shard_starts, indices, side="right") - 1
    passes = _occurrence(indices)
    shard_order = np.stack([rng.permutation(len(shard_starts) - 1) for _ in range(int(passes.max()) + 1)])
    windows = shard_order[passes, shards] // SHARDS_PER_WINDOW
    order = np.lexsort((rng.random(len(indices)), windows, passes))
    keys = np.empty(len(indices))
    keys[order] = (np.arange(len(indices)) + rng.random(len(indices))) / len(indices)
    return keys


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each element, the number of equal elements before it."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    positions = np.arange(len(values))
    first = np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]])
    out = np.empty(len(values), np.int64)
    out[order] = positions - np.maximum.accumulate(np.where(first, positions, 0))
    return out
