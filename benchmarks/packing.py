"""Compare our packing with other trainers' on the same lengths: efficiency, load balance, time and memory.

    python -m benchmarks.packing [--lengths FILE.csv] [--plan 7000000]

Without --lengths, samples follow the length distribution of the published instruction mix; sets that are hard to pack
are derived from them. All algorithms keep two budgets per row, tokens and tiles: those of
examples/instellavl/instruct.yaml.

packing efficiency   tokens over rows x seq_length
min rows / rows      fewest possible rows (a lower bound) over the number of rows
imbalance            cost of the most expensive of 256 data-parallel ranks over the mean; mean and maximum over an
                     epoch's steps
s per million        CPU time per million samples
MiB                  memory that packing adds to the lengths; each algorithm runs in its own process
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing_plan import measure_plan
from benchmarks.support.own_process import run_in_own_process
from benchmarks.support.packing_lengths import Samples, hard_to_pack, read_lengths, sample_mix
from benchmarks.support.packing_peers import PEERS
from benchmarks.support.report import RESULTS, save, table
from megatron_vlm.data.packing.distribution import min_rows
from megatron_vlm.data.packing.epoch_plan import Budget, plan_epoch

RANKS, ROWS_PER_RANK = 256, (1, 4, 16)
OURS = "megatron-vlm"
Packed = tuple[np.ndarray, np.ndarray]
"""(cumulative number of samples before each row [rows + 1], sample indices row by row [n])"""


def _ours(samples: Samples, budget: Budget, seed: int) -> Packed:
    plan = plan_epoch(np.arange(len(samples.tokens)), samples.tokens, samples.tiles, budget, seed, 0)
    return plan.row_starts, plan.members


def _peer(name: str) -> Callable[[Samples, Budget, int], Packed]:
    def pack(samples: Samples, budget: Budget, seed: int) -> Packed:
        rows = PEERS[name](samples.tokens, samples.tiles, budget, np.random.default_rng(seed))
        return np.cumsum([0, *map(len, rows)]), np.concatenate([np.array(row, np.int64) for row in rows])

    return pack


PACKINGS: dict[str, Callable[[Samples, Budget, int], Packed]] = {OURS: _ours, **{name: _peer(name) for name in PEERS}}


def imbalance(costs: np.ndarray, ranks: int, rows_per_rank: int) -> np.ndarray:
    """[steps] cost of the most expensive rank over the mean; rows go to ranks round-robin, as in the loader."""
    steps = len(costs) // (ranks * rows_per_rank)
    rank_costs = costs[: steps * ranks * rows_per_rank].reshape(steps, rows_per_rank, ranks).sum(1)
    return rank_costs.max(1) / rank_costs.mean(1)


def describe(samples: Samples, packed: Packed, budget: Budget) -> dict[str, Any]:
    """Packing efficiency and load balance; raises SystemExit if a sample is missing or a budget is exceeded."""
    starts, members = packed
    sums = [np.add.reduceat(values[members], starts[:-1]) for values in (samples.tokens, samples.tiles)]
    complete = np.array_equal(np.sort(members), np.arange(len(samples.tokens)))
    if not complete or sums[0].max() > budget.seq_length or sums[1].max() > budget.max_tiles:
        raise SystemExit(f"packing {samples.name!r} loses a sample or exceeds a budget")
    cost = np.add.reduceat(budget.cost.of(samples.tokens[members], samples.tiles[members]), starts[:-1])
    rows = len(starts) - 1
    by_rows_per_rank = {}
    for count in ROWS_PER_RANK:
        ratios = imbalance(cost, RANKS, count)
        if len(ratios):
            by_rows_per_rank[count] = {"mean": float(ratios.mean()), "max": float(ratios.max()), "steps": len(ratios)}
    halves = [float(half.mean() / cost.mean()) for half in np.array_split(cost, 2)]
    return {
        "rows": rows,
        "packing_efficiency": float(samples.tokens.sum() / (rows * budget.seq_length)),
        "min_rows_over_rows": min_rows(samples.tokens, samples.tiles, budget.seq_length, budget.max_tiles) / rows,
        "imbalance": by_rows_per_rank,
        "second_half_over_first": halves[1] / halves[0],
    }


def _pack(name: str, samples: Samples, budget: Budget, seed: int) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory, VmHWM
    before = _status("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    packed = PACKINGS[name](samples, budget, seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    added = _status("VmHWM") - before
    return {**describe(samples, packed, budget), "seconds": seconds, "cpu_seconds": cpu_seconds, "added_bytes": added}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def print_table(samples: Samples, results: dict[str, dict[str, Any]]) -> None:
    """Print one line per algorithm."""
    print(
        f"\n{samples.name}: {len(samples.tokens):,} samples, {samples.tokens.mean():.0f} tokens and "
        f"{samples.tiles.mean():.2f} tiles per sample"
    )
    lines = []
    for name, line in results.items():
        balance = [f"{b['mean']:.4f} / {b['max']:.4f}" for b in line["imbalance"].values()]
        lines.append(
            [
                name,
                f"{line['rows']:,}",
                f"{100 * line['packing_efficiency']:.2f} %",
                f"{100 * line['min_rows_over_rows']:.2f} %",
                *(balance + ["-"] * (len(ROWS_PER_RANK) - len(balance))),
                f"{1e6 * line['cpu_seconds'] / len(samples.tokens):.1f}",
                f"{line['added_bytes'] / 2**20:.0f}",
            ]
        )
    columns = [f"imbalance, {count} per rank" for count in ROWS_PER_RANK]
    header = ["algorithm", "rows", "packing efficiency", "min rows / rows", *columns, "s per million", "MiB"]
    print(table(header, lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="CSV with image_tokens, tiles, text_tokens of each sample")
    parser.add_argument("--samples", type=int, default=200_000, help="samples of the mix, without --lengths")
    parser.add_argument("--seq-length", type=int, default=32768, help="tokens per row")
    parser.add_argument("--max-tiles", type=int, default=80, help="tiles per row")
    parser.add_argument("--window", type=int, default=50_000, help="samples packed together: packing_window")
    parser.add_argument("--plan", type=int, default=7_000_000, help="samples of the epoch to plan; 0 skips this")
    parser.add_argument("--seed", type=int, default=1, help="seed of the samples and of packing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    budget = Budget(arguments.seq_length, arguments.max_tiles, arguments.window)
    rng = np.random.default_rng(arguments.seed)
    mix = read_lengths(arguments.lengths, rng) if arguments.lengths else sample_mix(arguments.samples, rng)
    sets = {}
    for samples in (mix, *hard_to_pack(mix, rng)):
        results = {
            name: run_in_own_process(
                _pack, name, samples, budget, arguments.seed, what=f"{name} on {samples.name!r}", fork=True
            )
            for name in PACKINGS
        }
        print_table(samples, results)
        sets[samples.name] = {"samples": len(samples.tokens), "packings": results}
    settings = {name: getattr(arguments, name) for name in ("seq_length", "max_tiles", "window", "seed")}
    result: dict[str, Any] = {"settings": settings, "sets": sets}
    if arguments.plan:
        with tempfile.TemporaryDirectory() as folder:
            plan = result["plan"] = measure_plan(Path(folder), arguments.plan, budget, arguments.seed)
        first, opened = plan["first"], plan["opened"]
        print(
            f"\nAn epoch of {plan['samples']:,} samples, {first['rows']:,} rows: planned and written in "
            f"{first['seconds']:.0f} s ({first['cpu_seconds']:.0f} s of one core), at most "
            f"{first['peak_bytes'] / 2**30:.2f} GiB for the whole process; reopened in mid-epoch in "
            f"{1000 * opened['seconds']:.1f} ms"
        )
    print(f"written to {save(arguments.output, 'packing', result)}")


if __name__ == "__main__":
    main()
