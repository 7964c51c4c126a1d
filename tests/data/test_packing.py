"""The plan: nothing lost, nothing twice, budgets held, rows full, and one counter that says it all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.merge import num_image_tokens
from megatron_vlm.data.packing import Budget, EpochPlan, plan_epoch
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


def _row_costs(plan: EpochPlan, tokens: np.ndarray, tiles: np.ndarray, budget: Budget) -> np.ndarray:
    return np.add.reduceat(budget.cost.of(tokens[plan.members], tiles[plan.members]), plan.row_starts[:-1])


def _imbalance(costs: np.ndarray, ranks: int, rows_per_rank: int) -> np.ndarray:
    """Of each step the cost of the rank that has most to do over the mean: row m * ranks + r goes to rank r."""
    steps = len(costs) // (ranks * rows_per_rank)
    shared = costs[: steps * ranks * rows_per_rank].reshape(steps, rows_per_rank, ranks).sum(1)
    return shared.max(1) / shared.mean(1)


@pytest.mark.parametrize("case", [photos, mixed])
def test_rows_that_run_at_the_same_time_cost_the_same(case: Callable[[int, np.random.Generator], Lengths]) -> None:
    tokens, tiles, budget = case(20_000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(20_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    for ranks, rows_per_rank, at_most in [(256, 1, 1.05), (256, 4, 1.02), (64, 16, 1.01), (7, 3, 1.02)]:
        assert np.median(_imbalance(costs, ranks, rows_per_rank)) < at_most


def test_unequal_rows_stand_beside_their_like() -> None:
    """Every sample is a row of its own and costs what it costs: only the order can help."""
    tokens = np.random.default_rng(0).integers(16_500, 32_000, 20_000)
    tiles, budget = np.full(20_000, 5), Budget(32768, 64, 50_000)
    plan = plan_epoch(np.arange(20_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    assert costs.max() / costs.mean() > 1.3
    assert np.median(_imbalance(costs, 256, 1)) < 1.06 and np.median(_imbalance(costs, 16, 1)) < 1.01


def test_cost_does_not_drift_over_the_epoch() -> None:
    rng = np.random.default_rng(0)
    tokens, tiles, budget = long(24_000, rng)
    budget.window = 2000
    plan = plan_epoch(rng.permutation(24_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    parts = [part.mean() / costs.mean() for part in np.array_split(costs, 4)]
    assert max(parts) < 1.03 and min(parts) > 0.97
    assert abs(np.corrcoef(np.arange(len(costs)), costs)[0, 1]) < 0.1
    first = np.array([tokens[plan.row(i)[0]] == tokens[plan.row(i)].max() for i in range(plan.rows)])
    assert first[np.diff(plan.row_starts) > 1].mean() < 0.7  # the longest does not always lead its row


def test_an_empty_epoch() -> None:
    plan = plan_epoch(np.empty(0, int), np.empty(0, int), np.empty(0, int), Budget(10, 2, 5), seed=1, epoch=0)
    assert plan.rows == 0 and len(plan.members) == 0
