"""Random mixtures, resumed at random rows by other numbers of ranks: the order and every sample count stay right."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vlm.data.loader import RowLoader
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, plan_epoch
from megatron_vlm.data.packing.plan_cache import PlanCache
from megatron_vlm.data.packing.row_plan import PlannedRow, RowPlan
from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.data.sources.mixture import Mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule
from megatron_vlm.data.sources.sample_source import Sample, SampleSource, SourceList

MIXES, FEW_MIXES = 1000, 80
WITH_WORKERS = 25
"""One in so many mixes is also read through loaders with worker processes."""


class Numbers(SampleSource):
    """Samples without content."""

    def __init__(self, count: int, shards: int | None) -> None:
        self.name, self._count = "numbers", count
        if shards:
            self.shard_starts = np.linspace(0, count, shards + 1).astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        raise NotImplementedError

    def content_hash(self) -> str:
        return ""


class Mix:
    """A random mixture with random lengths, budgets and window."""

    def __init__(self, number: int, folder: Path) -> None:
        self.rng = rng = random.Random(number)
        counts = [rng.randint(1, 80) for _ in range(rng.randint(1, 4))]
        sources = [Numbers(count, rng.choice([None, min(count, 20)])) for count in counts]
        self.entries = [(rng.randrange(len(counts)), self._rule()) for _ in range(rng.randint(1, 5))]
        self.mixture = Mixture(SourceList(sources), self.entries)
        total, self.seed = sum(counts), rng.randrange(1 << 30)
        lengths = np.random.default_rng(number)
        seq_length, max_tiles = rng.choice([64, 512, 4096]), rng.choice([1, 8, 64])
        self.tokens = lengths.integers(1, rng.choice([seq_length, max(seq_length // 8, 2)]) + 1, total).astype(np.int32)
        self.tiles = lengths.integers(0, max_tiles + 1, total).astype(np.int32)
        self.usable = lengths.random(total) < rng.choice([1.0, 0.8])
        self.usable[int(self.mixture.sources.starts[self.entries[0][0]])] = True
        self.budget = Budget(seq_length, max_tiles, rng.choice([7, 40, 1000]))
        self.folder = folder / str(number) if number % 10 == 0 else None

    def _rule(self) -> SamplingRule:
        amount = self.rng.randint(1, 60)
        return SamplingRule.parse(
            self.rng.choice(
                ["all", f"repeat:{amount / 20}", f"choose:{amount}", f"random:{amount}%", f"first:{amount}", "repeat:2"]
            )
        )

    def plan(self) -> RowPlan:
        """The plan of a process that has just started; some mixes use the plan cache."""
        return RowPlan(PlanCache(self.folder, "k", self.compute) if self.folder else self.compute)

    def compute(self, epoch: int) -> EpochPlan:
        samples = self.mixture.sample_epoch(self.usable, self.seed, epoch)
        return plan_epoch(samples, self.tokens, self.tiles, self.budget, self.seed, epoch)

    def expected_counts(self) -> Counter[int]:
        """How often an epoch must hold each sample, from the rules alone. What a rule picks at random is counted under
        -1 - source.
        """
        expected: Counter[int] = Counter()
        for source, rule in self.entries:
            start, stop = self.mixture.sources.starts[source : source + 2].tolist()
            usable = [number for number in range(start, stop) if self.usable[number]]
            amount = rule.amount
            if rule.kind in ("all", "repeat"):
                for number in usable:
                    expected[number] += int(amount)
                expected[-1 - source] += round((amount - int(amount)) * len(usable))
            elif rule.kind == "first":
                for number in usable:
                    expected[number] += int(number - start < amount)
            elif rule.kind == "random":
                picked = -(-amount * (stop - start) // Fraction(100))
                expected[-1 - source] += int(min(picked, len(usable)))
            else:
                for number in usable:
                    expected[number] += int(amount) // len(usable)
                expected[-1 - source] += int(amount) % max(len(usable), 1) if usable else 0
        return +expected


def _rows(plan: RowPlan, start: int, count: int) -> list[list[int]]:
    return [plan.row(row_index).members.tolist() for row_index in range(start, start + count)]


def _check_epoch(mix: Mix, plan: RowPlan, start: int) -> int:
    """Check the counts of the epoch that begins with row `start`. Returns the first row of the next one."""
    epoch = plan.row(start).epoch
    end = start + plan.rows
    taken = Counter(number for row in _rows(plan, start, end - start) for number in row)
    assert plan.row(end - 1).epoch == epoch and plan.row(end).epoch == epoch + 1
    expected = mix.expected_counts()
    at_random: Counter[int] = Counter()
    for number, times in taken.items():
        assert mix.usable[number] and times >= expected[number]
        at_random[-1 - mix.mixture.sources.locate(number)[0]] += times - expected[number]
    assert +at_random == Counter({number: times for number, times in expected.items() if number < 0})
    assert all(taken[number] >= times for number, times in expected.items() if number >= 0)
    return end


class _Echo:
    """Builds rows without tokens, whose sample ids are their sample numbers."""

    tokenizer = None
    sources = None

    def build(self, row: PlannedRow) -> PackedBatch:
        nothing = torch.empty(0)
        ids = [str(number) for number in row.members.tolist()]
        return PackedBatch(nothing, nothing, nothing, [0], nothing, nothing, 0, sample_ids=ids, row_index=row.row_index)


def _read_with_workers(mix: Mix, row_index: int, ranks: int, steps: int, rows: int) -> Iterator[list[int]]:
    """The rows of some steps, read by `ranks` loaders with worker processes."""
    loaders = []
    for rank in range(ranks):
        plan = mix.plan()
        rows_of_rank = plan.rows_of_rank(row_index, rank, ranks)
        loaders.append(RowLoader(plan, _Echo(), {}, rows_of_rank, mix.rng.randint(0, 4)))  # type: ignore[arg-type]
    for _, row in itertools.product(range(steps), range(rows)):
        batch = next(loaders[row % ranks])
        assert batch.row_index == row_index
        row_index += 1
        yield [int(name) for name in batch.sample_ids]
    for loader in loaders:
        loader.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores on purpose
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "mixes", [range(FEW_MIXES), pytest.param(range(FEW_MIXES, MIXES), marks=pytest.mark.full)], ids=["few", "rest"]
)
def test_a_thousand_mixes(tmp_path: Path, mixes: range) -> None:
    for number in mixes:
        mix = Mix(number, tmp_path)
        reference = RowPlan(mix.compute)
        second = _check_epoch(mix, reference, 0)
        _check_epoch(mix, reference, second)
        total = min(int(2.5 * second) + 3, 60)
        expected = _rows(reference, 0, total)
        row_index, seen = 0, []
        while row_index < total:  # resume again and again, each time with other ranks and rows per step
            ranks = mix.rng.randint(1, 8)
            rows, steps = ranks * mix.rng.randint(1, 3), mix.rng.randint(1, 4)
            if number % WITH_WORKERS == 0 and mix.rng.random() < 0.3:
                seen += _read_with_workers(mix, row_index, ranks, steps, rows)
            else:
                plan = mix.plan()
                iterators = [plan.rows_of_rank(row_index, rank, ranks) for rank in range(ranks)]
                seen += [next(iterators[row % ranks]).members.tolist() for row in range(steps * rows)]
            row_index += steps * rows
        assert seen[:total] == expected, f"mix {number}"


def test_seeking_a_row_plans_no_epoch_again(tmp_path: Path) -> None:
    mix = Mix(0, tmp_path)
    row = mix.plan().row(500)
    planned = []

    def compute(epoch: int) -> EpochPlan:
        planned.append(epoch)
        raise AssertionError(f"epoch {epoch} is planned again")

    assert mix.folder is not None
    again = RowPlan(PlanCache(mix.folder, "k", compute)).row(500)
    assert again.members.tolist() == row.members.tolist() and again.epoch == row.epoch > 0 and not planned
