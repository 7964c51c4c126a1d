"""Epoch plans: every sample once, rows within budgets, full, and ordered so that the cost of steps is balanced."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.support.packing_lengths import sample_mix
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, pack_window, plan_epoch
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles

Lengths = tuple[np.ndarray, np.ndarray, Budget]


def photos(n: int, rng: np.random.Generator) -> Lengths:
    """Photographs of many aspect ratios with short conversations, at the sizes of the real model."""
    geometry = ImageGeometry.of(ModelConfig(), "anyres")
    sizes = [(int(w), int(h)) for w, h in rng.integers(200, 2000, (n, 2))]
    tokens = np.array([num_image_tokens(size, geometry) for size in sizes]) + rng.integers(20, 400, n)
    return tokens, np.array([num_image_tiles(size, geometry) for size in sizes]), Budget(32768, 64, 50_000)


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


def lone(n: int, rng: np.random.Generator) -> Lengths:
    """More than half a row each: every sample is a row, so row costs differ."""
    return rng.integers(16_500, 32_000, n), np.full(n, 5), Budget(32768, 64, 50_000)


def awkward(n: int, rng: np.random.Generator) -> Lengths:
    """More than half a row each, or the whole tile budget."""
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
    assert plan.packing_efficiency == pytest.approx(tokens.sum() / (plan.rows * budget.seq_length))
    if case is not awkward:
        assert plan.packing_efficiency >= 0.99, plan.packing_efficiency


def test_rows_are_full_of_tiles_if_tiles_are_the_tighter_budget() -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(2, 6, 5000)
    plan = plan_epoch(np.arange(5000), tiles * 10, tiles, Budget(1000, 40, 50_000), seed=1, epoch=0)
    assert tiles.sum() / (plan.rows * 40) >= 0.99


def test_a_repeated_sample_is_packed_as_often_as_it_occurs() -> None:
    samples = np.array([3, 3, 3, 5, 0, 0])
    plan = plan_epoch(samples, np.full(6, 40), np.zeros(6, int), Budget(100, 4, 50), seed=1, epoch=0)
    assert Counter(plan.members.tolist()) == Counter(samples.tolist()) and plan.rows == 3


@pytest.mark.parametrize("case", [photos, small, text, long, mixed, awkward])
def test_samples_stay_in_their_window(case: Callable[[int, np.random.Generator], Lengths]) -> None:
    """So a bounded shard cache suffices. No row has samples of two windows."""
    rng = np.random.default_rng(0)
    tokens, tiles, budget = case(1050, rng)
    budget.window = 100
    order = rng.permutation(1050)
    plan = plan_epoch(order, tokens, tiles, budget, seed=1, epoch=0)
    position = np.argsort(order)[plan.members]
    windows = np.concatenate([np.full(len(w), i) for i, w in enumerate(np.array_split(np.arange(1050), 11))])
    assert (windows[position] == windows).all() and abs(position - np.arange(1050)).max() < 100
    assert all(len(set(windows[slice(*plan.row_starts[i : i + 2])])) == 1 for i in range(plan.rows))


def test_the_last_rows_of_an_epoch_are_full_too() -> None:
    """The samples are split into windows of equal size, without a small last one."""
    tokens, tiles, budget = photos(1001, np.random.default_rng(0))
    budget.window = 500
    plan = plan_epoch(np.arange(1001), tokens, tiles, budget, seed=1, epoch=0)
    efficiency = np.add.reduceat(tokens[plan.members], plan.row_starts[:-1]) / budget.seq_length
    assert efficiency[-10:].min() > 0.9


def test_plans_depend_on_seed_and_epoch() -> None:
    tokens, tiles, budget = small(500, np.random.default_rng(0))

    def plan(seed: int, epoch: int) -> list[int]:
        return plan_epoch(np.arange(500), tokens, tiles, budget, seed, epoch).members.tolist()

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1) != plan(2, 1)


_DIGEST_OF_A_PLAN = """
import hashlib
import numpy as np
from megatron_vlm.data.packing.row_cost import RowCost
from megatron_vlm.data.packing.epoch_plan import PLAN_VERSION, Budget, plan_epoch
rng = np.random.default_rng(5)
tiles = (rng.random(6000) < 0.7) * rng.integers(2, 6, 6000)
tokens = tiles * 300 + rng.integers(10, 2000, 6000)
budget = Budget(16384, 40, 2500, RowCost(0.1, 3000.0, 800_000.0))
plan = plan_epoch(np.arange(6000), tokens, tiles, budget, seed=1, epoch=2)
print(PLAN_VERSION, hashlib.sha256(plan.members.tobytes() + plan.row_starts.tobytes()).hexdigest()[:16])
"""


def test_every_process_computes_the_same_plan() -> None:
    """With any number of threads. If a change of the algorithm changes the digest, raise PLAN_VERSION too."""
    digests = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", _DIGEST_OF_A_PLAN]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
        digests.add(done.stdout.strip())
    assert digests == {"4 e8c2558a467dcec0"}


def _row_costs(plan: EpochPlan, tokens: np.ndarray, tiles: np.ndarray, budget: Budget) -> np.ndarray:
    return np.add.reduceat(budget.cost.of(tokens[plan.members], tiles[plan.members]), plan.row_starts[:-1])


def _imbalance(costs: np.ndarray, ranks: int, rows_per_rank: int) -> np.ndarray:
    """[steps] cost of the slowest rank over the mean of all ranks. Row m * ranks + r goes to rank r."""
    steps = len(costs) // (ranks * rows_per_rank)
    per_rank = costs[: steps * ranks * rows_per_rank].reshape(steps, rows_per_rank, ranks).sum(1)
    return per_rank.max(1) / per_rank.mean(1)


@pytest.mark.parametrize("case", [photos, mixed])
def test_the_ranks_of_a_step_have_the_same_cost(case: Callable[[int, np.random.Generator], Lengths]) -> None:
    tokens, tiles, budget = case(20_000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(20_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    for ranks, rows_per_rank, at_most in [(256, 1, 1.05), (256, 4, 1.02), (64, 16, 1.01), (7, 3, 1.02)]:
        assert np.median(_imbalance(costs, ranks, rows_per_rank)) < at_most


def test_consecutive_rows_have_similar_costs() -> None:
    """Rows of one sample each differ in cost: only their order can balance a step."""
    tokens, tiles, budget = lone(20_000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(20_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    assert costs.max() / costs.mean() > 1.3
    assert _imbalance(costs, 256, 1).max() < 1.05 and _imbalance(costs, 16, 1).max() < 1.01


def test_costs_are_continuous_between_windows() -> None:
    """The rows of one step may come from two windows."""
    tokens, tiles, budget = lone(20_000, np.random.default_rng(0))
    budget.window = 2000
    plan = plan_epoch(np.arange(20_000), tokens, tiles, budget, seed=1, epoch=0)
    assert _imbalance(_row_costs(plan, tokens, tiles, budget), 16, 1).max() < 1.05


def test_few_steps_mix_rows_of_one_and_two_samples() -> None:
    """Of samples near half a row, some pair up and some cannot, so some rows cost twice as much as others."""
    tokens = np.random.default_rng(0).integers(16_000, 18_000, 20_000)
    budget = Budget(32768, 64, 50_000)
    plan = plan_epoch(np.arange(20_000), tokens, np.full(20_000, 5), budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, np.full(20_000, 5), budget)
    assert costs.max() > 1.7 * costs.min()
    for rows_per_rank, at_most in [(1, 1.05), (4, 1.02), (16, 1.02)]:
        assert _imbalance(costs, 256, rows_per_rank).mean() < at_most


@pytest.mark.parametrize("case", [long, mixed, photos, lone])
def test_cost_does_not_drift_over_the_epoch(case: Callable[[int, np.random.Generator], Lengths]) -> None:
    rng = np.random.default_rng(0)
    tokens, tiles, budget = case(24_000, rng)
    budget.window = 2000
    plan = plan_epoch(rng.permutation(24_000), tokens, tiles, budget, seed=1, epoch=0)
    costs = _row_costs(plan, tokens, tiles, budget)
    quarters = [quarter.mean() / costs.mean() for quarter in np.array_split(costs, 4)]
    assert max(quarters) < 1.02 and min(quarters) > 0.98
    slope = np.polyfit(np.linspace(0, 1, len(costs)), costs / costs.mean(), 1)[0]
    assert abs(slope) < 0.03


def test_the_longest_sample_is_not_always_first_in_its_row() -> None:
    tokens, tiles, budget = long(2000, np.random.default_rng(0))
    plan = plan_epoch(np.arange(2000), tokens, tiles, budget, seed=1, epoch=0)
    first = np.array([tokens[plan.row(i)[0]] == tokens[plan.row(i)].max() for i in range(plan.rows)])
    assert first[np.diff(plan.row_starts) > 1].mean() < 0.7


def test_an_empty_epoch() -> None:
    plan = plan_epoch(np.empty(0, int), np.empty(0, int), np.empty(0, int), Budget(10, 2, 5), seed=1, epoch=0)
    assert plan.rows == 0 and len(plan.members) == 0


def test_no_additional_row_for_a_few_tokens() -> None:
    """About 3,470 rows have a tenth of a row to spare in total. After the first swaps, a few samples do not fit."""
    samples = sample_mix(52_000, np.random.default_rng(1))
    rows = np.cumsum(samples.tokens)[49_000:50_000] / 32768
    count = 49_001 + int(np.where(rows % 1 < 0.9, rows % 1, 0).argmax())
    tokens, tiles = samples.tokens[:count], samples.tiles[:count]
    _, counts = pack_window(tokens, tiles, Budget(32768, 80, count), np.random.default_rng(5))
    assert len(counts) == math.ceil(tokens.sum() / 32768)
