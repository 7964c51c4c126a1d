"""Whatever the lengths: each sample in one row, budgets held, rows full, as even as the samples allow."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.packing.exchange import Lengths, balance_rows, min_rows

SEQ_LENGTH, MAX_TILES = 4096, 40


def _random(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of one of many kinds: from all tiny to all as large as a row, with tiles or without."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(1, 1500))
    longest = int(rng.choice([1, 20, 300, SEQ_LENGTH // 2, SEQ_LENGTH // 2 + 1, SEQ_LENGTH]))
    shortest = int(rng.choice([1, max(longest // 2, 1), longest]))
    most_tiles = int(rng.choice([0, 1, 6, MAX_TILES]))
    return rng.integers(shortest, longest + 1, count), rng.integers(0, most_tiles + 1, count)


def _share_out(tokens: np.ndarray, tiles: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(samples of each row, cost of each row), costs being squares of lengths."""
    cost = np.rint(tokens.astype(float) ** 2 / SEQ_LENGTH).astype(int)
    lengths = Lengths.of(tokens, tiles, cost, SEQ_LENGTH, MAX_TILES)
    table = balance_rows(lengths, np.arange(len(tokens)), np.random.default_rng(0))
    rows = [row[row != lengths.empty] for row in table]
    return rows, np.array([cost[row].sum() for row in rows])


@pytest.mark.parametrize("numbers", [range(start, start + 10) for start in range(0, 60, 10)], ids=str)
def test_each_sample_in_one_row_within_budgets(numbers: range) -> None:
    for number in numbers:
        tokens, tiles = _random(number)
        rows, _ = _share_out(tokens, tiles)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(tokens))), number
        assert min(len(row) for row in rows) >= 1, number
        assert max(tokens[row].sum() for row in rows) <= SEQ_LENGTH, number
        assert max(tiles[row].sum() for row in rows) <= MAX_TILES, number


@pytest.mark.parametrize(("shortest", "longest"), [(1, 200), (100, 500), (10, 1300)])
def test_rows_are_full(shortest: int, longest: int) -> None:
    tokens = np.random.default_rng(0).integers(shortest, longest, 4000)
    rows, cost = _share_out(tokens, np.zeros(4000, int))
    full = tokens.sum() / SEQ_LENGTH
    assert len(rows) <= np.ceil(full) + 0.004 * full
    assert np.sort(cost)[-2] < 1.2 * cost.mean()


def test_no_more_rows_than_the_tiles_fill() -> None:
    """Six tiles each: six samples to a row of 40, whatever the tokens."""
    tokens = np.random.default_rng(0).integers(50, 300, 3000)
    rows, cost = _share_out(tokens, np.full(3000, 6))
    assert len(rows) == 3000 / 6
    assert np.sort(cost)[-2] < 1.1 * cost.mean()


def test_least_rows_written_out() -> None:
    for number in range(300):
        rng = np.random.default_rng(number)
        seq_length, max_tiles, count = int(rng.integers(1, 300)), int(rng.integers(0, 50)), int(rng.integers(0, 60))
        tokens, tiles = rng.integers(1, seq_length + 1, count), rng.integers(0, max_tiles + 1, count)
        if number % 3 == 0:
            tokens = np.minimum(tokens, max(seq_length // 4, 1))
        least = 1
        for sizes, most in ((tokens, seq_length), (tiles, max_tiles)):
            least = max(least, int(np.ceil(sizes.sum() / max(most, 1))))
            for m in range(1, 64):
                least = max(least, int(np.ceil((sizes * (m + 1) > most).sum() / m)))
        assert min_rows(tokens, tiles, seq_length, max_tiles) == least, number


@pytest.mark.parametrize("spread", [20, 60, 200])
def test_near_half_a_row_as_many_pair_up_as_can(spread: int) -> None:
    """The best there is: the longest that still fits beside it goes to each, from the shortest on."""
    tokens = np.rint(np.random.default_rng(0).normal(SEQ_LENGTH / 2 + 60, spread, 2000)).astype(int)
    rows, _ = _share_out(tokens, np.zeros(2000, int))
    left, pairs = np.sort(tokens), 0
    short, long = 0, len(left) - 1
    while short < long:
        fits = left[short] + left[long] <= SEQ_LENGTH
        pairs, short, long = pairs + fits, short + fits, long - 1
    assert len(rows) <= (2000 - pairs) * 1.005


def test_where_two_never_fit_each_has_a_row() -> None:
    tokens = np.random.default_rng(0).integers(SEQ_LENGTH // 2 + 1, SEQ_LENGTH + 1, 500)
    rows, _ = _share_out(tokens, np.zeros(500, int))
    assert [len(row) for row in rows] == [1] * 500


def test_pairs_that_fill_a_row_are_found() -> None:
    """A third and two thirds of a row, of as many samples each."""
    tokens = np.repeat([SEQ_LENGTH // 3, SEQ_LENGTH - SEQ_LENGTH // 3], 300)
    rows, cost = _share_out(tokens, np.zeros(600, int))
    assert len(rows) <= 303 and np.median(cost) == cost.max()


def test_among_rows_as_full_costs_are_even() -> None:
    """Long and short samples: the cheapest and the dearest row differ by little."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(5000) < 0.1, rng.integers(1000, 2000, 5000), rng.integers(20, 200, 5000))
    _, cost = _share_out(tokens, np.zeros(5000, int))
    assert cost.std() / cost.mean() < 0.05
