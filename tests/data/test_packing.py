"""The plan: nothing lost, nothing twice, budgets held, rows full, and one counter that says it all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.merge import num_image_tokens
from megatron_vlm.data.packing import Budget, EpochPlan, RowPlan, pack_window, plan_epoch
from megatron_vlm.data.tiling import tile_count

Lengths = tuple[np.ndarray, np.ndarray, Budget]


def photos(n: int, rng: np.random.Generator) -> Lengths:
    """Photographs of many shapes with short conversations, at the real model's sizes."""
    model = ModelConfig()
    sizes = [(int(w), int(h)) for w, h in rng.integers(200, 2000, (n, 2))]
    tokens = np.array([num_image_tokens(size, model, "anyres") for size in sizes]) + rng.integers(20, 400, n)
    return tokens, np.array([tile_count(size, model, "anyres") for size in sizes]), Budget(32768, 64, 50_000)


def small(n: int, rng: np.random.Generator) -> Lengths:
    return rng.integers(80, 130, n), np.ones(n, int), Budget(1024, 16, 50_000)


def one_tile(n: int, rng: np.random.Generator) -> Lengths:
    return 576 + rng.integers(20, 80, n), np.ones(n, int), Budget(8192, 64, 50_000)


def text(n: int, rng: np.random.Generator) -> Lengths:
    return np.minimum(rng.lognormal(6, 1.2, n).astype(int) + 5, 32768), np.zeros(n, int), Budget(32768, 64, 50_000)


def long(n: int, rng: np.random.Generator) -> Lengths:
    return np.minimum(rng.lognormal(8.5, 1.2, n).astype(int) + 5, 32768), np.zeros(n, int), Budget(32768, 64, 50_000)


def mixed(n: int, rng: np.random.Generator) -> Lengths:
    tiles = (rng.random(n) < 0.7) * rng.integers(2, 6, n)
    return tiles * 300 + rng.integers(10, 2000, n), tiles, Budget(16384, 40, 50_000)


def awkward(n: int, rng: np.random.Generator) -> Lengths:
    """More than half a row each, or the tile budget used up by one."""
    return rng.choice([60, 61, 100], n), rng.choice([0, 4], n), Budget(100, 4, 97)


@pytest.mark.parametrize("case", [photos, small, one_tile, text, long, mixed, awkward])
def test_every_sample_once_within_budgets(case: Callable[[int, np.random.Generator], Lengths]) -> None:
    tokens, tiles, budget = case(5000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(5000), tokens, tiles, budget, seed=1, epoch=0)
    assert sorted(plan.members.tolist()) == list(range(5000))
    rows = [plan.row(i) for i in range(plan.rows)]
    assert all(len(row) for row in rows)
    assert max(tokens[row].sum() for row in rows) <= budget.seq_length
    assert max(tiles[row].sum() for row in rows) <= budget.max_tiles
    assert plan.fill == pytest.approx(tokens.sum() / (plan.rows * budget.seq_length))
    if case is not awkward:
        assert plan.fill >= 0.99, plan.fill


def test_a_budget_of_tiles_is_filled_where_it_binds() -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(2, 6, 5000)
    plan = plan_epoch(np.arange(5000), tiles * 10, tiles, Budget(1000, 40, 50_000), seed=1, epoch=0)
    assert tiles.sum() / (plan.rows * 40) >= 0.99


def test_a_large_epoch_in_seconds() -> None:
    rng = np.random.default_rng(0)
    tokens, tiles, budget = photos(20_000, rng)
    chosen = rng.integers(0, 20_000, 200_000)
    started = time.process_time()
    plan = plan_epoch(np.arange(200_000), tokens[chosen], tiles[chosen], budget, seed=1, epoch=0)
    assert time.process_time() - started < 10  # under 1 s on an idle core
    assert len(plan.members) == 200_000 and plan.fill >= 0.99


def test_repeated_samples_are_packed_as_often() -> None:
    samples = np.array([3, 3, 3, 5, 0, 0])
    plan = plan_epoch(samples, np.full(6, 40), np.zeros(6, int), Budget(100, 4, 50), seed=1, epoch=0)
    assert Counter(plan.members.tolist()) == Counter(samples.tolist()) and plan.rows == 3


def test_windows_hold_consecutive_samples_of_the_order() -> None:
    """A window of 100 of 1000: what is packed together comes together, so that a bounded cache suffices."""
    rng = np.random.default_rng(0)
    tokens, tiles, budget = small(1000, rng)
    order = rng.permutation(1000)
    plan = plan_epoch(order, tokens, tiles, Budget(budget.seq_length, 16, 100), seed=1, epoch=0)
    for start in range(0, 1000, 100):
        assert sorted(plan.members[start : start + 100]) == sorted(order[start : start + 100])


def test_plans_follow_from_seed_and_epoch() -> None:
    tokens, tiles, budget = small(500, np.random.default_rng(0))

    def plan(seed: int, epoch: int) -> list[int]:
        return plan_epoch(np.arange(500), tokens, tiles, budget, seed, epoch).members.tolist()

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1) != plan(2, 1)


def test_rows_come_in_no_order_of_length() -> None:
    tokens, tiles, budget = long(3000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(3000), tokens, tiles, budget, seed=1, epoch=0)
    documents = np.diff(plan.row_starts)
    assert abs(np.corrcoef(np.arange(plan.rows), documents)[0, 1]) < 0.15
    first = np.array([tokens[plan.row(i)[0]] == tokens[plan.row(i)].max() for i in range(plan.rows)])
    assert first[documents > 1].mean() < 0.7  # the longest does not always lead its row


def test_empty_window() -> None:
    assert pack_window(np.empty(0, int), np.empty(0, int), 10, 2, np.random.default_rng(0)) == []


def make_plan() -> RowPlan:
    """Epochs of 5 to 9 rows, each of one sample numbered 100 * epoch + row."""

    def plan_of_epoch(epoch: int) -> EpochPlan:
        rows = 5 + epoch % 5
        return EpochPlan(np.arange(rows + 1), 100 * epoch + np.arange(rows), 1.0)

    return RowPlan(plan_of_epoch)


def test_one_counter_finds_epoch_and_row() -> None:
    expected = [100 * epoch + row for epoch in range(20) for row in range(5 + epoch % 5)]
    plan = make_plan()
    assert [int(plan.row(counter).members[0]) for counter in range(len(expected))] == expected
    for counter in (97, 3, 60, 0, 61):  # also backwards, and in a plan that has seen nothing
        assert int(plan.row(counter).members[0]) == int(make_plan().row(counter).members[0]) == expected[counter]
    assert plan.row(12).epoch == 2 and plan.rows == 7


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_the_rows(size: int) -> None:
    shares = [make_plan().share(7, rank, size) for rank in range(size)]
    rows = [next(share).counter for _ in range(6) for share in shares]
    assert rows == list(range(7, 7 + 6 * size))


def test_nothing_to_plan() -> None:
    with pytest.raises(DataError, match="the dataset is empty"):
        RowPlan(lambda epoch: EpochPlan(np.zeros(1, int), np.empty(0, int), 0.0))
