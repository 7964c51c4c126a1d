"""For all kinds of lengths: each sample in one row, rows within budgets, full, and as balanced as the samples allow."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.packing.distribution import Lengths
from megatron_vlm.data.packing.exchange import balance_rows

SEQ_LENGTH, MAX_TILES = 4096, 40


def _random_lengths(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, tiles) of samples that range from all tiny to all as large as a row, with or without tiles."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(1, 1500))
    longest = int(rng.choice([1, 20, 300, SEQ_LENGTH // 2, SEQ_LENGTH // 2 + 1, SEQ_LENGTH]))
    shortest = int(rng.choice([1, max(longest // 2, 1), longest]))
    most_tiles = int(rng.choice([0, 1, 6, MAX_TILES]))
    return rng.integers(shortest, longest + 1, count), rng.integers(0, most_tiles + 1, count)


def _pack(tokens: np.ndarray, tiles: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(samples of each row, cost of each row), where the cost of a sample is the square of its length."""
    cost = np.rint(tokens.astype(float) ** 2 / SEQ_LENGTH).astype(int)
    lengths = Lengths.of(tokens, tiles, cost, SEQ_LENGTH, MAX_TILES)
    table = balance_rows(lengths, np.arange(len(tokens)), np.random.default_rng(0))
    rows = [row[row != lengths.empty] for row in table]
    return rows, np.array([cost[row].sum() for row in rows])


@pytest.mark.parametrize("numbers", [range(start, start + 10) for start in range(0, 60, 10)], ids=str)
def test_each_sample_in_one_row_within_budgets(numbers: range) -> None:
    for number in numbers:
        tokens, tiles = _random_lengths(number)
        rows, _ = _pack(tokens, tiles)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(tokens))), number
        assert min(len(row) for row in rows) >= 1, number
        assert max(tokens[row].sum() for row in rows) <= SEQ_LENGTH, number
        assert max(tiles[row].sum() for row in rows) <= MAX_TILES, number


@pytest.mark.parametrize(("shortest", "longest"), [(1, 200), (100, 500), (10, 1300)])
def test_rows_are_full(shortest: int, longest: int) -> None:
    tokens = np.random.default_rng(0).integers(shortest, longest, 4000)
    rows, cost = _pack(tokens, np.zeros(4000, int))
    full = tokens.sum() / SEQ_LENGTH
    assert len(rows) <= np.ceil(full) + 0.004 * full
    assert np.sort(cost)[-2] < 1.2 * cost.mean()


def test_rows_are_full_of_tiles_if_tiles_are_the_tighter_budget() -> None:
    """Six tiles each: six samples per row of 40 tiles, for any number of tokens."""
    tokens = np.random.default_rng(0).integers(50, 300, 3000)
    rows, cost = _pack(tokens, np.full(3000, 6))
    assert len(rows) == 3000 / 6
    assert np.sort(cost)[-2] < 1.1 * cost.mean()


@pytest.mark.parametrize("std", [20, 60, 200])
def test_samples_near_half_a_row_are_paired_as_far_as_possible(std: int) -> None:
    """The optimum is greedy: from the shortest sample on, pair each with the longest remaining one that fits."""
    tokens = np.rint(np.random.default_rng(0).normal(SEQ_LENGTH / 2 + 60, std, 2000)).astype(int)
    rows, _ = _pack(tokens, np.zeros(2000, int))
    ordered, pairs = np.sort(tokens), 0
    short, long = 0, len(ordered) - 1
    while short < long:
        fits = ordered[short] + ordered[long] <= SEQ_LENGTH
        pairs, short, long = pairs + fits, short + fits, long - 1
    assert len(rows) <= (2000 - pairs) * 1.005


def test_samples_longer_than_half_a_row_get_a_row_each() -> None:
    tokens = np.random.default_rng(0).integers(SEQ_LENGTH // 2 + 1, SEQ_LENGTH + 1, 500)
    rows, _ = _pack(tokens, np.zeros(500, int))
    assert [len(row) for row in rows] == [1] * 500


def test_samples_of_one_and_two_thirds_of_a_row_are_paired() -> None:
    """As many samples of one length as of the other."""
    tokens = np.repeat([SEQ_LENGTH // 3, SEQ_LENGTH - SEQ_LENGTH // 3], 300)
    rows, cost = _pack(tokens, np.zeros(600, int))
    assert len(rows) <= 303 and np.median(cost) == cost.max()


def test_costs_of_full_rows_are_balanced() -> None:
    """For a mix of long and short samples, whose rows could differ in cost."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(5000) < 0.1, rng.integers(1000, 2000, 5000), rng.integers(20, 200, 5000))
    _, cost = _pack(tokens, np.zeros(5000, int))
    assert cost.std() / cost.mean() < 0.05
