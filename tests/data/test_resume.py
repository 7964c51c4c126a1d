"""Whatever is mixed, wherever it stops, however it goes on: every sample as often as its share says, in one order."""

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

from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.data.loader import RowLoader
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, plan_epoch
from megatron_vlm.data.packing.plan_cache import PlanCache
from megatron_vlm.data.packing.row_plan import PlannedRow, RowPlan
from megatron_vlm.data.sources.mixture import Mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule
from megatron_vlm.data.sources.sample_source import Sample, SampleSource, SourceList

MIXES, A_FEW = 1000, 80
WITH_WORKERS = 25
"""Every so many mixes are read through loaders with worker processes too."""


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
        self.draw = draw = random.Random(number)
        counts = [draw.randint(1, 80) for _ in range(draw.randint(1, 4))]
        sources = [Numbers(count, draw.choice([None, min(count, 20)])) for count in counts]
        self.entries = [(draw.randrange(len(counts)), self._rule()) for _ in range(draw.randint(1, 5))]
        self.mixture = Mixture(SourceList(sources), self.entries)
        total, self.seed = sum(counts), draw.randrange(1 << 30)
        rng = np.random.default_rng(number)
        seq_length, max_tiles = draw.choice([64, 512, 4096]), draw.choice([1, 8, 64])
        self.tokens = rng.integers(1, draw.choice([seq_length, max(seq_length // 8, 2)]) + 1, total).astype(np.int32)
        self.tiles = rng.integers(0, max_tiles + 1, total).astype(np.int32)
        self.usable = rng.random(total) < draw.choice([1.0, 0.8])
        self.usable[int(self.mixture.sources.starts[self.entries[0][0]])] = True
        self.budget = Budget(seq_length, max_tiles, draw.choice([7, 40, 1000]))
        self.folder = folder / str(number) if number % 10 == 0 else None

    def _rule(self) -> SamplingRule:
        amount = self.draw.randint(1, 60)
        return SamplingRule.parse(
            self.draw.choice(
                ["all", f"repeat:{amount / 20}", f"choose:{amount}", f"random:{amount}%", f"first:{amount}", "repeat:2"]
            )
        )

    def plan(self) -> RowPlan:
        """As a process that has just started makes it, some through files."""
        return RowPlan(PlanCache(self.folder, "k", self.compute) if self.folder else self.compute)

    def compute(self, epoch: int) -> EpochPlan:
        samples = self.mixture.sample_epoch(self.usable, self.seed, epoch)
        return plan_epoch(samples, self.tokens, self.tiles, self.budget, self.seed, epoch)

    def shares(self) -> Counter[int]:
        """How often each sample is due, worked out from the rules alone; drawn ones are counted under -1 - source."""
        due: Counter[int] = Counter()
        for source, rule in self.entries:
            start, stop = self.mixture.sources.starts[source : source + 2].tolist()
            usable = [number for number in range(start, stop) if self.usable[number]]
            amount = rule.amount
            if rule.kind in ("all", "repeat"):
                for number in usable:
                    due[number] += int(amount)
                due[-1 - source] += round((amount - int(amount)) * len(usable))
            elif rule.kind == "first":
                for number in usable:
                    due[number] += int(number - start < amount)
            elif rule.kind == "random":
                wanted = -(-amount * (stop - start) // Fraction(100))
                due[-1 - source] += int(min(wanted, len(usable)))
            else:
                for number in usable:
                    due[number] += int(amount) // len(usable)
                due[-1 - source] += int(amount) % max(len(usable), 1) if usable else 0
        return +due


def _rows(plan: RowPlan, start: int, count: int) -> list[list[int]]:
    return [plan.row(counter).members.tolist() for counter in range(start, start + count)]


def _check_shares(mix: Mix, plan: RowPlan, start: int) -> int:
    """Of the epoch that begins with row `start`. Returns where the next one begins."""
    epoch = plan.row(start).epoch
    end = start + plan.rows
    taken = Counter(number for row in _rows(plan, start, end - start) for number in row)
    assert plan.row(end - 1).epoch == epoch and plan.row(end).epoch == epoch + 1
    due = mix.shares()
    drawn: Counter[int] = Counter()
    for number, times in taken.items():
        assert mix.usable[number] and times >= due[number]
        drawn[-1 - mix.mixture.sources.locate(number)[0]] += times - due[number]
    assert +drawn == Counter({number: times for number, times in due.items() if number < 0})
    assert all(taken[number] >= times for number, times in due.items() if number >= 0)
    return end


class _Echo:
    """Builds rows that hold nothing but their numbers."""

    tokenizer = None
    sources = None

    def build(self, row: PlannedRow) -> PackedBatch:
        nothing = torch.empty(0)
        ids = [str(number) for number in row.members.tolist()]
        return PackedBatch(nothing, nothing, nothing, [0], nothing, nothing, 0, sample_ids=ids, row_index=row.row_index)


def _through_loaders(mix: Mix, counter: int, ranks: int, steps: int, rows: int) -> Iterator[list[int]]:
    """The rows of some steps as `ranks` loaders with workers give them."""
    loaders = []
    for rank in range(ranks):
        plan = mix.plan()
        share = plan.rows_of_rank(counter, rank, ranks)
        loaders.append(RowLoader(plan, _Echo(), {}, share, mix.draw.randint(0, 4)))  # type: ignore[arg-type]
    for _, row in itertools.product(range(steps), range(rows)):
        batch = next(loaders[row % ranks])
        assert batch.row_index == counter
        counter += 1
        yield [int(name) for name in batch.sample_ids]
    for loader in loaders:
        loader.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores, on purpose
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "numbers", [range(A_FEW), pytest.param(range(A_FEW, MIXES), marks=pytest.mark.full)], ids=["a_few", "the_rest"]
)
def test_a_thousand_mixes(tmp_path: Path, numbers: range) -> None:
    for number in numbers:
        mix = Mix(number, tmp_path)
        reference = RowPlan(mix.compute)
        second = _check_shares(mix, reference, 0)
        _check_shares(mix, reference, second)
        wanted = min(int(2.5 * second) + 3, 60)
        expected = _rows(reference, 0, wanted)
        counter, seen = 0, []
        while counter < wanted:  # one stop after the other, each time with other ranks and rows per step
            ranks = mix.draw.randint(1, 8)
            rows, steps = ranks * mix.draw.randint(1, 3), mix.draw.randint(1, 4)
            if number % WITH_WORKERS == 0 and mix.draw.random() < 0.3:
                seen += _through_loaders(mix, counter, ranks, steps, rows)
            else:
                plan = mix.plan()
                shares = [plan.rows_of_rank(counter, rank, ranks) for rank in range(ranks)]
                seen += [next(shares[row % ranks]).members.tolist() for row in range(steps * rows)]
            counter += steps * rows
        assert seen[:wanted] == expected, f"mix {number}"


def test_going_to_a_counter_replays_nothing(tmp_path: Path) -> None:
    mix = Mix(0, tmp_path)
    far = mix.plan().row(500)
    made = []

    def compute(epoch: int) -> EpochPlan:
        made.append(epoch)
        raise AssertionError(f"epoch {epoch} is planned again")

    assert mix.folder is not None
    found = RowPlan(PlanCache(mix.folder, "k", compute)).row(500)
    assert found.members.tolist() == far.members.tolist() and found.epoch == far.epoch > 0 and not made
