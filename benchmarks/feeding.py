"""Whether the loader keeps up with training: steps on rows as they are read, beside steps on rows held in memory.

    python -m benchmarks.feeding                    # Instella-VL-1B on rows of 32,768 tokens, bf16, all parts trained
    python -m benchmarks.feeding --workers 4 8

Rows come from MDS shards of drawn images (`pictures.py`) through the loader as in a run: read, decoded, tiled,
tokenized, packed, pinned, and each is one optimizer step. `of the limit` says how fast steps are against the same
steps with every row in memory beforehand; `waited` is the share of the time in which the training asked for a row that
was not there. Nothing is recomputed, so that the GPU is as hard to feed as can be.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from benchmarks import transformers_loop
from benchmarks.pictures import shards_of_pictures
from benchmarks.report import RESULTS, machine, save, table
from benchmarks.train_step import PackedLoop, seconds
from megatron_vlm.config import DataConfig, ParallelConfig, Recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.launch import distributed

CONFIG = Path(__file__).parent.parent / "examples/instellavl/instruct.yaml"
SETTLE = 3
"""Steps before the clock starts: kernels are chosen, and the rows read ahead while the workers started are used up."""
SAME_LOSS = 1e-6
"""Relative difference allowed between the first losses on the same row, before anything is trained."""


@dataclass
class Fed:
    """One pass of steps."""

    workers: int | None
    """None: rows were in memory."""
    seconds: list[float]
    """Of each step, the waiting for its row included."""
    waited: float
    """Seconds of all of them."""


def recipe_of_shards(config: Path, folder: Path, samples: int) -> Recipe:
    """The model and rows of a recipe, on drawn images in shards below `folder`."""
    recipe = load_recipe(config)
    recipe.parallel = ParallelConfig()
    recipe.training = replace(recipe.training, global_batch_size=1, recompute_granularity=None)
    shards, tokenizer, words = shards_of_pictures(folder, samples)
    recipe.model.image_token_index = words
    recipe.data = DataConfig(
        data_path=[str(shards)],
        tokenizer_model=str(tokenizer),
        seq_length=recipe.data.seq_length,
        max_tiles_per_row=recipe.data.max_tiles_per_row,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
    )
    return recipe


def open_loader(recipe: Recipe, workers: int) -> RowLoader:
    recipe = replace(recipe, data=replace(recipe.data, num_workers=workers))
    return build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)


def rows_in_memory(recipe: Recipe, workers: int, count: int) -> list[PackedBatch]:
    """The first rows of the run."""
    loader = open_loader(recipe, workers)
    rows = list(itertools.islice(loader, count))
    loader.close()
    return rows


def train_on(loop: PackedLoop, rows: Iterator[PackedBatch], steps: int) -> list[float]:
    """Seconds of each step."""
    return [seconds(lambda: loop.step([next(rows)])) for _ in range(steps)]


def fed_from_memory(loop: PackedLoop, rows: list[PackedBatch]) -> Fed:
    iterator = iter(rows)
    train_on(loop, iterator, SETTLE)
    return Fed(None, train_on(loop, iterator, len(rows) - SETTLE), 0.0)


def fed_by_loader(loop: PackedLoop, recipe: Recipe, workers: int, steps: int) -> Fed:
    loader = open_loader(recipe, workers)
    train_on(loop, loader, SETTLE)
    loader.data_wait_seconds = 0.0
    fed = Fed(workers, train_on(loop, loader, steps), loader.data_wait_seconds)
    loader.close()
    return fed


def check_same_rows(loop: PackedLoop, recipe: Recipe, row: PackedBatch) -> None:
    """The loader's first row and the one in memory must have the same loss, or the passes do not do the same work."""
    loader = open_loader(recipe, 0)
    ours, limit = loop.forward_backward([next(loader)]), loop.forward_backward([row])
    loop.optimizer.zero_grad()
    loader.close()
    if not abs(ours - limit) <= SAME_LOSS * limit:
        raise SystemExit(
            f"not the same work: the first row has loss {ours:.8f} from the loader and {limit:.8f} from memory"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe: its model and rows are used")
    parser.add_argument("--samples", type=int, default=320, help="conversations in the shards, most about an image")
    parser.add_argument("--steps", type=int, default=24, help="steps that are timed, a row each")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4, 8], help="worker processes; 0: none")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of_shards(arguments.config, Path(folder), arguments.samples)
        with distributed(recipe.parallel):
            run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    with torch.device(current_device()):
        weights = transformers_loop.build(recipe)
    loop = PackedLoop(weights, recipe)
    del weights  # its memory is not ours
    rows = rows_in_memory(recipe, max(arguments.workers), SETTLE + arguments.steps)
    check_same_rows(loop, recipe, rows[0])
    fed_from_memory(loop, rows)  # kernels are compiled for rows of every kind
    passes = [fed_from_memory(loop, rows)]
    passes += [fed_by_loader(loop, recipe, workers, arguments.steps) for workers in arguments.workers]
    report(arguments, recipe, rows[SETTLE:], passes)


def report(arguments: argparse.Namespace, recipe: Recipe, rows: list[PackedBatch], passes: list[Fed]) -> None:
    """Print the table and write the JSON."""
    tokens, tiles = (sum(getattr(row, name) for row in rows) for name in ("num_tokens", "num_tiles"))
    limit = sum(passes[0].seconds)
    lines, results = [], []
    for fed in passes:
        name = "rows in memory" if fed.workers is None else f"loader, {fed.workers} workers"
        whole = sum(fed.seconds)
        results.append(
            {
                "name": name,
                "seconds": fed.seconds,
                "tokens_per_second": tokens / whole,
                "tiles_per_second": tiles / whole,
                "against_limit": limit / whole,
                "waited": fed.waited / whole,
            }
        )
        lines.append(
            [name, f"{statistics.median(fed.seconds):.3f}", f"{tokens / whole:,.0f}", f"{tiles / whole:.0f}",
             f"{100 * limit / whole:.1f} %", f"{100 * fed.waited / whole:.1f} %"]
        )  # fmt: skip
    about = machine()
    print(
        f"\n{about['device']}, {about['cores']} cores, torch {about['torch']}; {len(rows)} steps, each a row of "
        f"{recipe.data.seq_length}: {tokens:,} tokens, {tiles} tiles\n"
    )
    print(table(["fed from", "s a step", "tokens/s", "tiles/s", "of the limit", "waited"], lines))
    settings = {"samples": arguments.samples, "steps": arguments.steps, "seq_length": recipe.data.seq_length}
    name = f"feeding-{about['device'].lower().replace(' ', '-')}"
    path = save(arguments.output, name, {"settings": settings, "tokens": tokens, "tiles": tiles, "passes": results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
