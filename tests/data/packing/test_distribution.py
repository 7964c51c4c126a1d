"""min_rows equals the bound of its docstring, computed sample by sample; distribution keeps every sample."""

from __future__ import annotations

import numpy as np

from megatron_vlm.data.packing.distribution import Lengths, distribute, min_rows


def test_min_rows() -> None:
    for number in range(300):
        rng = np.random.default_rng(number)
        seq_length, max_tiles, count = int(rng.integers(1, 300)), int(rng.integers(0, 50)), int(rng.integers(0, 60))
        tokens, tiles = rng.integers(1, seq_length + 1, count), rng.integers(0, max_tiles + 1, count)
        if number % 3 == 0:
            tokens = np.minimum(tokens, max(seq_length // 4, 1))
        expected = 1
        for sizes, budget in ((tokens, seq_length), (tiles, max_tiles)):
            expected = max(expected, int(np.ceil(sizes.sum() / max(budget, 1))))
            for m in range(1, 64):
                expected = max(expected, int(np.ceil((sizes * (m + 1) > budget).sum() / m)))
        assert min_rows(tokens, tiles, seq_length, max_tiles) == expected, number


def test_rows_have_about_equal_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens, tiles = rng.integers(10, 200, 2000), rng.integers(0, 5, 2000)
    lengths = Lengths.of(tokens, tiles, tokens, 4096, 100)
    rows = distribute(lengths, np.arange(2000))
    assert sorted(rows[rows != lengths.empty].tolist()) == list(range(2000))
    assert len(rows) == min_rows(tokens, tiles, 4096, 100)
    assert lengths.tokens[rows].sum(1).max() < 1.02 * lengths.tokens[rows].sum(1).mean()
