"""Time and memory of planning an epoch of millions of samples, and of reopening that plan in mid-epoch."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.own_process import run_in_own_process
from benchmarks.support.packing_lengths import sample_mix
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, plan_epoch
from megatron_vlm.data.packing.plan_cache import PlanCache
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.sources.mixture import Mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule
from megatron_vlm.data.sources.sample_source import Sample, SampleSource, SourceList

DATA_SETS, SHARDS = 100, 40
_CHUNK = 500_000
"""Samples whose lengths are sampled at a time, which bounds memory."""


class _Lengths(SampleSource):
    """A sharded source with a length and no samples."""

    def __init__(self, count: int) -> None:
        self.name, self._count = "lengths", count
        self.shard_starts = np.linspace(0, count, SHARDS + 1).astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        raise NotImplementedError

    def content_hash(self) -> str:
        return ""


def _make_plan(folder: Path, count: int, budget: Budget, seed: int) -> dict[str, Any]:
    """Shuffle the mixture, pack it and write the plan, timed together."""
    rng = np.random.default_rng(seed)
    chunks = [sample_mix(min(_CHUNK, count - start), rng) for start in range(0, count, _CHUNK)]
    tokens = np.concatenate([chunk.tokens.astype(np.int32) for chunk in chunks])
    tiles = np.concatenate([chunk.tiles.astype(np.int32) for chunk in chunks])
    del chunks
    sizes = np.diff(np.linspace(0, count, DATA_SETS + 1).astype(int))
    sources = SourceList([_Lengths(int(size)) for size in sizes])
    mixture = Mixture(sources, [(number, SamplingRule()) for number in range(DATA_SETS)])
    usable = np.ones(count, bool)

    def compute(epoch: int) -> EpochPlan:
        return plan_epoch(mixture.sample_epoch(usable, seed, epoch), tokens, tiles, budget, seed, epoch)

    start, cpu_start = time.perf_counter(), time.process_time()
    plan = PlanCache(folder, "benchmark", compute)(0)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_bytes": _peak_bytes(),
        "rows": plan.rows,
        "packing_efficiency": plan.packing_efficiency,
    }


def _open_plan(folder: Path, row_index: int) -> dict[str, Any]:
    """Read one row of the stored plan, as a process that resumes there does."""

    def compute(epoch: int) -> EpochPlan:
        raise RuntimeError(f"epoch {epoch} was planned again instead of read")

    before = _peak_bytes()
    start = time.perf_counter()
    row = RowPlan(PlanCache(folder, "benchmark", compute)).row(row_index)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "samples": len(row.members), "added_bytes": _peak_bytes() - before}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_plan(folder: Path, count: int, budget: Budget, seed: int) -> dict[str, Any]:
    """Plan an epoch of `count` samples of the mix in 100 sharded sets, then reopen the plan in mid-epoch.

    Each of the two runs has its own process.

    Returns:
        samples; first: seconds, cpu_seconds, peak_bytes of the process, rows, packing_efficiency; opened: seconds,
        added_bytes, samples of the row.
    """
    first = run_in_own_process(_make_plan, folder, count, budget, seed, what="planning")
    opened = run_in_own_process(_open_plan, folder, first["rows"] // 2, what="reopening the plan")
    return {"samples": count, "first": first, "opened": opened}
