"""The losses of training in FP8 beside those in bf16, on the same rows from the same weights, and the time of a row.

python -m benchmarks.fp8_losses                        # Instella-VL-1B, 200 iterations of each
python -m benchmarks.fp8_losses --config RECIPE.yaml --steps 3
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.feeding import recipe_of_shards
from benchmarks.real_run import Run, from_memory, rows_of, shards_parser
from benchmarks.real_size import LINEAR_LAYERS, NOT_HERE
from benchmarks.support.report import machine, save, table
from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.data.rows.rank_batch import RankBatch
from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.launch import distributed

KINDS: dict[str, dict[str, Any]] = {
    "megatron-core's layers": {},
    **{suffix.removeprefix(", "): settings for suffix, settings in LINEAR_LAYERS.items()},
}
WINDOW = 20
"""Iterations that a loss is averaged over before it is compared: neighbouring rows differ more than kinds of layers."""


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Of the averages over WINDOW iterations, relative to the reference's."""
    window = min(WINDOW, len(losses))
    averages = [
        [statistics.mean(values[start : start + window]) for start in range(len(values) - window + 1)]
        for values in (losses, reference)
    ]
    return max(abs(ours / theirs - 1) for ours, theirs in zip(*averages, strict=True))


def train(recipe: Recipe, rows: list[RankBatch], kinds: Iterable[str]) -> dict[str, Run | None]:
    """A run of each of these KINDS; None where it cannot run on this machine."""
    runs: dict[str, Run | None] = {}
    for kind in kinds:
        training = replace(recipe.training, **KINDS[kind])
        try:
            run = from_memory(replace(recipe, training=training), rows, warmup=min(3, len(rows) - 2))
        except ConfigError as error:
            print(f"{kind}: {error}", flush=True)
            runs[kind] = None
            continue
        runs[kind] = run
        print(f"{kind}: loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}", flush=True)
        gc.collect()
        if on_gpu():
            torch.cuda.empty_cache()
    return runs


def main() -> None:
    parser = shards_parser(__doc__, "iterations of each kind, one row each", steps=200)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all; the first is the reference"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of_shards(arguments.config, Path(folder), arguments.samples)
        recipe.data.num_workers = arguments.workers
        recipe.training.train_iters = arguments.steps
        with distributed(recipe.parallel, seed=recipe.training.seed):
            runs = train(recipe, rows_of(recipe), arguments.kinds)
    reference = next(run for run in runs.values() if run is not None)
    lines, results = [], []
    for kind, run in runs.items():
        if run is None:
            lines.append([kind, NOT_HERE, "", ""])
            continue
        difference, seconds = largest_difference(run.losses, reference.losses), statistics.median(run.seconds)
        lines.append([kind, f"{seconds:.3f}", f"{run.losses[-1]:.4f}", f"{100 * difference:.2f} %"])
        results.append({"kind": kind, "seconds": run.seconds, "losses": run.losses, "largest_difference": difference})
    about = machine()
    precision = "bf16" if recipe.training.bf16 else "fp32"
    print(f"\n{about['device']}, torch {about['torch']}, {precision} where nothing else is said\n")
    print(table(["layers", "s per row", "last loss", f"largest difference over {WINDOW} iterations"], lines))
    name = f"fp8_losses-{about['device'].lower().replace(' ', '-')}"
    path = save(arguments.output, name, {"steps": arguments.steps, "runs": results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
