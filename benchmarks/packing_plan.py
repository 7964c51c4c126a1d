"""Planning an epoch of millions of samples: the first plan, and opening it in the middle, each in a fresh process."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing_lengths import draw_mix
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, plan_epoch
from megatron_vlm.data.packing.plan_cache import PlanCache
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.sources.mixture import Mixture
from megatron_vlm.data.sources.mixture_file import SamplingRule
from megatron_vlm.data.sources.sample_source import Sample, SampleSource, SourceList

DATA_SETS, SHARDS = 100, 40
_DRAWN_AT_ONCE = 500_000


class _Lengths(SampleSource):
    """Samples without content, in shards."""

    def __init__(self, count: int) -> None:
        self.name, self._count = "lengths", count
        self.shard_starts = np.linspace(0, count, SHARDS + 1).astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        raise NotImplementedError

    def content_hash(self) -> str:
        return ""


def _make_plan(answer: Connection, folder: Path, count: int, budget: Budget, seed: int) -> None:
    """Order of the mixture, packing, and writing the plan, timed together."""
    rng = np.random.default_rng(seed)
    parts = [draw_mix(min(_DRAWN_AT_ONCE, count - start), rng) for start in range(0, count, _DRAWN_AT_ONCE)]
    tokens = np.concatenate([part.tokens.astype(np.int32) for part in parts])
    tiles = np.concatenate([part.tiles.astype(np.int32) for part in parts])
    del parts
    sizes = np.diff(np.linspace(0, count, DATA_SETS + 1).astype(int))
    sources = SourceList([_Lengths(int(size)) for size in sizes])
    mixture = Mixture(sources, [(number, SamplingRule()) for number in range(DATA_SETS)])
    usable = np.ones(count, bool)

    def compute(epoch: int) -> EpochPlan:
        return plan_epoch(mixture.draw(usable, seed, epoch), tokens, tiles, budget, seed, epoch)

    started, worked = time.perf_counter(), time.process_time()
    plan = PlanCache(folder, "benchmark", compute)(0)
    answer.send(
        {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - worked,
            "peak_bytes": _peak_bytes(),
            "rows": plan.rows,
            "fill": plan.packing_efficiency,
        }
    )


def _open_plan(answer: Connection, folder: Path, counter: int) -> None:
    """What a process that starts at `counter` does."""

    def compute(epoch: int) -> EpochPlan:
        raise RuntimeError(f"the plan of epoch {epoch} is made again")

    before = _peak_bytes()
    started = time.perf_counter()
    row = RowPlan(PlanCache(folder, "benchmark", compute)).row(counter)
    seconds = time.perf_counter() - started
    answer.send({"seconds": seconds, "samples": len(row.members), "added_bytes": _peak_bytes() - before})


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_fresh_process(work: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise RuntimeError("the process that planned ended without an answer") from None
    process.join()
    return found


def measure_plan(folder: Path, count: int, budget: Budget, seed: int) -> dict[str, Any]:
    """Plan an epoch of `count` samples of the mix, drawn from 100 sharded sets, then open it in the middle.

    Returns:
        samples; first: seconds, cpu_seconds, peak_bytes of the whole process, rows, fill; opened: seconds,
        added_bytes, samples of the row.
    """
    first = _in_fresh_process(_make_plan, folder, count, budget, seed)
    return {"samples": count, "first": first, "opened": _in_fresh_process(_open_plan, folder, first["rows"] // 2)}
