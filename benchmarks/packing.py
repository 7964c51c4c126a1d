"""Our packing beside other trainers', on the same lengths: how full rows are, how even, in what time and memory.

    python -m benchmarks.packing [--lengths FILE.csv] [--plan 7000000]

Without a file of lengths the samples are drawn to be shaped like the published instruction mix; from them hostile sets
are made. All hold two budgets, tokens and tiles of a row, those of examples/instellavl/instruct.yaml. `of the best`
compares the number of rows with a bound below which no packing can go. Balance is that of steps over 256 data ranks:
the cost of the rank that has most to do over the mean, its mean and its maximum over all steps of an epoch. Time is
that of the processor; each packing runs in a process of its own, whose memory beyond the lengths is counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing_lengths import Samples, draw_mix, hostile, read_lengths
from benchmarks.packing_peers import PEERS
from benchmarks.packing_plan import measure_plan
from benchmarks.report import RESULTS, save, table
from megatron_vlm.data.packing.epoch_plan import Budget, plan_epoch
from megatron_vlm.data.packing.exchange import min_rows

RANKS, ROWS_PER_RANK = 256, (1, 4, 16)
OURS = "megatron-vlm"
Packed = tuple[np.ndarray, np.ndarray]
"""(first place of each row and the end [rows + 1], samples row by row [n])"""


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
    """[steps] the dearest rank's cost over the mean; a step's rows are dealt to ranks in turn, as the loader does."""
    steps = len(costs) // (ranks * rows_per_rank)
    shared = costs[: steps * ranks * rows_per_rank].reshape(steps, rows_per_rank, ranks).sum(1)
    return shared.max(1) / shared.mean(1)


def describe(samples: Samples, packed: Packed, budget: Budget) -> dict[str, Any]:
    """Fill and balance of rows; raises SystemExit where they lack a sample or exceed a budget."""
    starts, members = packed
    sums = [np.add.reduceat(values[members], starts[:-1]) for values in (samples.tokens, samples.tiles)]
    whole = np.array_equal(np.sort(members), np.arange(len(samples.tokens)))
    if not whole or sums[0].max() > budget.seq_length or sums[1].max() > budget.max_tiles:
        raise SystemExit(f"the packing of {samples.name} lacks a sample or exceeds a budget")
    cost = np.add.reduceat(budget.cost.of(samples.tokens[members], samples.tiles[members]), starts[:-1])
    rows = len(starts) - 1
    balance = {}
    for count in ROWS_PER_RANK:
        found = imbalance(cost, RANKS, count)
        if len(found):
            balance[count] = {"mean": float(found.mean()), "max": float(found.max()), "steps": len(found)}
    halves = [float(half.mean() / cost.mean()) for half in np.array_split(cost, 2)]
    return {
        "rows": rows,
        "fill": float(samples.tokens.sum() / (rows * budget.seq_length)),
        "of_the_best": min_rows(samples.tokens, samples.tiles, budget.seq_length, budget.max_tiles) / rows,
        "balance": balance,
        "second_half_over_first": halves[1] / halves[0],
    }


def _work(answer: Connection, name: str, samples: Samples, budget: Budget, seed: int) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory begins anew
    before = _status("VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    packed = PACKINGS[name](samples, budget, seed)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    peak = _status("VmHWM") - before
    found = describe(samples, packed, budget)
    answer.send({**found, "seconds": seconds, "cpu_seconds": cpu_seconds, "added_bytes": peak})


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this needs Linux")


def measure(name: str, samples: Samples, budget: Budget, seed: int) -> dict[str, Any]:
    """What `describe` tells, with seconds, cpu_seconds and added_bytes, of a packing in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, name, samples, budget, seed))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit(f"{name} failed on {samples.name}") from None
    process.join()
    return found


def print_table(samples: Samples, found: dict[str, dict[str, Any]]) -> None:
    """One line for each packing."""
    print(
        f"\n{samples.name}: {len(samples.tokens):,} samples, {samples.tokens.mean():.0f} tokens and "
        f"{samples.tiles.mean():.2f} tiles each"
    )
    lines = []
    for name, line in found.items():
        balance = [f"{b['mean']:.4f} / {b['max']:.4f}" for b in line["balance"].values()]
        lines.append(
            [
                name,
                f"{line['rows']:,}",
                f"{100 * line['fill']:.2f} %",
                f"{100 * line['of_the_best']:.2f} %",
                *(balance + ["-"] * (len(ROWS_PER_RANK) - len(balance))),
                f"{1e6 * line['cpu_seconds'] / len(samples.tokens):.1f}",
                f"{line['added_bytes'] / 2**20:.0f}",
            ]
        )
    columns = [f"max/mean, {count} a rank" for count in ROWS_PER_RANK]
    print(table(["packing", "rows", "fill", "of the best", *columns, "s per million", "MiB"], lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="CSV with image_tokens, tiles, text_tokens of each sample")
    parser.add_argument("--samples", type=int, default=200_000, help="samples to draw where there is no such file")
    parser.add_argument("--seq-length", type=int, default=32768, help="tokens of a row")
    parser.add_argument("--max-tiles", type=int, default=80, help="tiles of a row")
    parser.add_argument("--window", type=int, default=50_000, help="samples that are packed together (ours)")
    parser.add_argument("--plan", type=int, default=7_000_000, help="samples of the epoch that is planned; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="of the samples and of the packing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    budget = Budget(arguments.seq_length, arguments.max_tiles, arguments.window)
    rng = np.random.default_rng(arguments.seed)
    mix = read_lengths(arguments.lengths, rng) if arguments.lengths else draw_mix(arguments.samples, rng)
    sets = {}
    for samples in (mix, *hostile(mix, rng)):
        found = {name: measure(name, samples, budget, arguments.seed) for name in PACKINGS}
        print_table(samples, found)
        sets[samples.name] = {"samples": len(samples.tokens), "packings": found}
    settings = {name: getattr(arguments, name) for name in ("seq_length", "max_tiles", "window", "seed")}
    result: dict[str, Any] = {"settings": settings, "sets": sets}
    if arguments.plan:
        with tempfile.TemporaryDirectory() as folder:
            plan = result["plan"] = measure_plan(Path(folder), arguments.plan, budget, arguments.seed)
        first, opened = plan["first"], plan["opened"]
        print(
            f"\nAn epoch of {plan['samples']:,} samples, {first['rows']:,} rows: planned and written in "
            f"{first['seconds']:.0f} s ({first['cpu_seconds']:.0f} s of one core), at most "
            f"{first['peak_bytes'] / 2**30:.2f} GiB, all in all; opened in the middle in "
            f"{1000 * opened['seconds']:.1f} ms"
        )
    print(f"written to {save(arguments.output, 'packing', result)}")


if __name__ == "__main__":
    main()
