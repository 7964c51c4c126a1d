"""Samples are shuffled, and a bounded cache fetches each shard once."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from megatron_vlm.data.sources.shard_shuffle import SHARDS_PER_WINDOW, shuffle_keys


def test_shards_are_fetched_once_by_a_small_cache() -> None:
    starts = np.arange(0, 100_001, 500)  # 200 shards
    order = np.argsort(shuffle_keys(np.arange(100_000), starts, np.random.default_rng(1)))
    cache: OrderedDict[int, None] = OrderedDict()
    fetched = 0
    for shard in (order // 500).tolist():
        if shard not in cache:
            fetched += 1
            if len(cache) == 2 * SHARDS_PER_WINDOW:
                cache.popitem(last=False)
        cache[shard] = None
        cache.move_to_end(shard)
    assert fetched == 200
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.2  # not the order in the shards


def test_repeated_samples_come_in_passes() -> None:
    indices = np.tile(np.arange(1000), 2)
    order = indices[np.argsort(shuffle_keys(indices, np.arange(0, 1001, 10), np.random.default_rng(1)))]
    assert sorted(order[:1000]) == sorted(order[1000:]) == list(range(1000))
    assert order[:1000].tolist() != order[1000:].tolist()


def test_keys_are_reproducible_and_uniform() -> None:
    indices, starts = np.arange(1000), np.arange(0, 1001, 20)
    one, two = (shuffle_keys(indices, starts, np.random.default_rng([3, 0])) for _ in range(2))
    assert (one == two).all() and (one != shuffle_keys(indices, starts, np.random.default_rng([3, 1]))).any()
    assert np.histogram(one, 10, (0, 1))[0].tolist() == [100] * 10
    assert len(shuffle_keys(indices[:0], starts, np.random.default_rng(0))) == 0
    assert len(shuffle_keys(indices, None, np.random.default_rng(0))) == 1000
