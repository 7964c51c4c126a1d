"""The real command, from shards, beside the same steps on rows in memory: what a run loses outside of its steps.

    python -m benchmarks.real_run                          # Instella-VL-1B on rows of 32,768 tokens, 4 workers
    python -m benchmarks.real_run --config RECIPE.yaml --steps 6 --workers 1

`python -m megatron_vlm.train` runs in a process of its own; an iteration's time is from one printed line to the next.
The same rows then train the same initial weights in this process, one step after the other. Both must have the same
losses. On a GPU the trainer is run once more under the profiler, for the time in which the device computes nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.feeding import CONFIG, recipe_of_shards
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.train_step import time_call
from megatron_vlm.config import Recipe, recipe_to_dict
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.rows.rank_batch import RankBatch
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.finite_update import update_and_loss
from megatron_vlm.training.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, sum_over_ranks
from megatron_vlm.training.trainer import Trainer

LOSS_TOLERANCE = {True: 2e-2, False: 1e-4}
"""Relative difference allowed between the losses of an iteration, by bf16. The printed loss has four decimals."""
PROFILED_STEPS = 4
_ITERATION = re.compile(r"iteration +(\d+)/\d+ \| lm loss ([\d.]+|nan) ")


@dataclass
class Run:
    """Iterations of one of the two."""

    seconds: list[float]
    """Of each timed iteration."""
    losses: list[float]
    """Of all iterations."""


def real_command(recipe: Recipe, folder: Path, warmup: int) -> Run:
    """Run `python -m megatron_vlm.train`; raises SystemExit with its output if it fails."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    command = [sys.executable, "-W", "ignore", "-u", "-m", "megatron_vlm.train", "--config", str(path)]
    printed, when, losses = [], [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if found := _ITERATION.search(line):
                when.append(time.perf_counter())
                losses.append(float(found.group(2)))
    if process.returncode or len(when) != recipe.training.train_iters:
        raise SystemExit(f"the command failed:\n{''.join(printed[-40:])}")
    return Run([after - before for before, after in itertools.pairwise(when)][warmup:], losses)


def rows_of(recipe: Recipe) -> list[RankBatch]:
    """The rows of all iterations, as the loader's workers make them."""
    view = rank_view(recipe)
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True, view=view)
    rows = list(itertools.islice(loader, recipe.training.train_iters))
    loader.close()
    return rows


def from_memory(recipe: Recipe, rows: list[RankBatch], warmup: int) -> Run:
    """The same iterations without loader, log and checkpoints."""
    chunks = build_model(recipe, for_training=True)
    initialize_weights(chunks, recipe)
    wrapped = wrap_for_data_parallel(chunks, recipe)
    optimizer = build_optimizer(wrapped, recipe)
    schedule, losses = build_schedule(optimizer, recipe), []

    def step(row: RankBatch) -> None:
        totals = sum_over_ranks(forward_backward(wrapped, [iter([row])], recipe))
        _, _, loss, _ = update_and_loss(optimizer, totals)
        schedule.step(increment=1)
        losses.append(loss)

    seconds = [time_call(lambda row=row: step(row)) for row in rows]  # type: ignore[misc]
    return Run(seconds[1 + warmup :], losses)


def busy_fraction(intervals: Iterable[tuple[float, float]]) -> float:
    """Of the time from the first start to the last end, the part in which at least one interval runs."""
    ordered = sorted(intervals)
    busy, until = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - ordered[0][0])


def device_idle(recipe: Recipe, warmup: int) -> float | None:
    """Fraction of the time of some iterations in which the device computes and copies nothing; None on a CPU."""
    activity = torch.profiler.ProfilerActivity
    trainer = Trainer(recipe)
    for _ in range(warmup + 1):
        trainer.train_step()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu() else activity.CPU]) as profile:
        for _ in range(PROFILED_STEPS):
            trainer.train_step()
        if on_gpu():
            torch.cuda.synchronize()
    trainer.loader.close()
    trainer.checkpointer.close()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return 1 - busy_fraction(kernels) if kernels else None


def check_same_losses(command: Run, memory: Run, bf16: bool) -> None:
    """Both trained on the same rows from the same weights; raises SystemExit if not."""
    for number, (ours, reference) in enumerate(zip(command.losses, memory.losses, strict=True), 1):
        if not abs(ours - reference) <= LOSS_TOLERANCE[bf16] * reference + 1e-4:
            raise SystemExit(f"iteration {number}: the command has loss {ours:.4f}, rows in memory {reference:.4f}")


def shards_parser(description: str | None, steps_help: str, *, steps: int) -> argparse.ArgumentParser:
    """The flags of a benchmark that trains on shards of made-up conversations."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe that gives the model and the row length")
    parser.add_argument("--samples", type=int, default=320, help="conversations in the shards; 9 of 10 have an image")
    parser.add_argument("--steps", type=int, default=steps, help=steps_help)
    parser.add_argument("--workers", type=int, default=4, help="worker processes of the loader")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    return parser


def main() -> None:
    parser = shards_parser(__doc__, "timed iterations, one row each", steps=50)
    parser.add_argument("--warmup", type=int, default=5, help="iterations before these")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of_shards(arguments.config, Path(folder), arguments.samples)
        recipe.data.num_workers = arguments.workers
        recipe.training.train_iters = 1 + arguments.warmup + arguments.steps
        recipe.training.save, recipe.training.log_interval = None, 1
        command = real_command(recipe, Path(folder), arguments.warmup)
        with distributed(recipe.parallel, seed=recipe.training.seed):
            rows = rows_of(recipe)
            memory = from_memory(recipe, rows, arguments.warmup)
            check_same_losses(command, memory, recipe.training.bf16)
            gc.collect()  # the model of the steps before
            if on_gpu():
                torch.cuda.empty_cache()
            idle = device_idle(recipe, arguments.warmup)
    report(arguments, recipe, rows[1 + arguments.warmup :], command, memory, idle)


def report(
    arguments: argparse.Namespace,
    recipe: Recipe,
    rows: list[RankBatch],
    command: Run,
    memory: Run,
    idle: float | None,
) -> None:
    """Print the table and write the JSON."""
    tokens = statistics.mean(row.num_tokens for row in rows)
    medians = {"python -m megatron_vlm.train": command, "rows in memory": memory}
    seconds = {name: statistics.median(run.seconds) for name, run in medians.items()}
    slower = seconds["python -m megatron_vlm.train"] / seconds["rows in memory"] - 1
    about = machine()
    print(
        f"\n{about['device']}, {about['cores']} cores, torch {about['torch']}; one row of {recipe.data.seq_length} "
        f"tokens per iteration, {arguments.workers} workers; median of {len(rows)} iterations\n"
    )
    lines = [[name, f"{value:.3f}", f"{tokens / value:,.0f}"] for name, value in seconds.items()]
    print(table(["", "s per row", "tokens/s"], lines))
    print(f"\nthe command takes {100 * slower:+.1f} % more time (wanted: at most 2 %)")
    print("device idle: " + ("not measured on a CPU" if idle is None else f"{100 * idle:.1f} % (wanted: at most 3 %)"))
    content = {
        "settings": {name: getattr(arguments, name) for name in ("samples", "steps", "warmup", "workers")},
        "seq_length": recipe.data.seq_length,
        "command_seconds": command.seconds,
        "memory_seconds": memory.seconds,
        "more_time": slower,
        "device_idle": idle,
    }
    path = save(arguments.output, f"real_run-{about['device'].lower().replace(' ', '-')}", content)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
