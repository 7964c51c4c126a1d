"""Does the loader keep up with training? Steps on rows from the loader, compared with steps on rows held in memory.

    python -m benchmarks.feeding                    # Instella-VL-1B on rows of 32,768 tokens, bf16, all parts trained
    python -m benchmarks.feeding --workers 4 8

The loader reads MDS shards of synthetic images (`synthetic_images.py`) as in a training run: it reads, decodes, tiles,
tokenizes, packs and pins each row. Each row is one optimizer step. `speed` is relative to the same steps with all rows
in memory; `data wait` is the fraction of time that training waited for a row. Recomputation is off, so that the GPU
consumes rows as fast as possible.
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

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import transformers_loop
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.support.synthetic_images import write_image_shards
from benchmarks.train_step import PackedLoop, time_call
from megatron_vlm.config import DataConfig, ParallelConfig, Recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.rows.rank_batch import RankBatch
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.launch import distributed

CONFIG = Path(__file__).parent.parent / "examples/instellavl/instruct.yaml"
WARMUP_STEPS = 3
"""Untimed steps, in which kernels are selected and the rows that workers prefetched at start are used up."""
LOSS_TOLERANCE = 1e-6
"""Relative difference allowed between the losses of the first row from the loader and from memory."""


@dataclass
class Pass:
    """Timed steps with one source of rows."""

    workers: int | None
    """Worker processes of the loader; None: rows were in memory."""
    seconds: list[float]
    """Per step, including the wait for its row."""
    data_wait_seconds: float
    """Of all steps."""


def recipe_of_shards(config: Path, folder: Path, samples: int) -> Recipe:
    """The recipe's model and row length, with shards of synthetic images written below `folder`."""
    recipe = load_recipe(config)
    recipe.parallel = ParallelConfig()
    recipe.training = replace(
        recipe.training,
        global_batch_size=1,
        recompute_granularity=None,
        pretrained_checkpoint=None,
        save=None,
        load=None,
    )
    shards, tokenizer, recipe.model.image_token_index = write_image_shards(folder, samples)
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
    view = rank_view(recipe)
    return build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True, view=view)


def rows_in_memory(recipe: Recipe, workers: int, count: int) -> list[RankBatch]:
    """The first `count` rows of the run."""
    loader = open_loader(recipe, workers)
    rows = list(itertools.islice(loader, count))
    loader.close()
    return rows


def train_on(loop: PackedLoop, rows: Iterator[RankBatch], steps: int) -> list[float]:
    """Train one step per row; returns the seconds of each."""
    return [time_call(lambda: loop.step([next(rows)])) for _ in range(steps)]


def pass_from_memory(loop: PackedLoop, rows: list[RankBatch]) -> Pass:
    iterator = iter(rows)
    train_on(loop, iterator, WARMUP_STEPS)
    return Pass(None, train_on(loop, iterator, len(rows) - WARMUP_STEPS), 0.0)


def pass_from_loader(loop: PackedLoop, recipe: Recipe, workers: int, steps: int) -> Pass:
    loader = open_loader(recipe, workers)
    train_on(loop, loader, WARMUP_STEPS)
    loader.data_wait_seconds = 0.0
    measured = Pass(workers, train_on(loop, loader, steps), loader.data_wait_seconds)
    loader.close()
    return measured


def check_same_loss(loop: PackedLoop, recipe: Recipe, row: RankBatch) -> None:
    """The first row must have the same loss from the loader and from memory; raises SystemExit if not."""
    loader = open_loader(recipe, 0)
    from_loader, from_memory = loop.forward_backward([next(loader)]), loop.forward_backward([row])
    loop.optimizer.zero_grad()
    loader.close()
    if not abs(from_loader - from_memory) <= LOSS_TOLERANCE * from_memory:
        raise SystemExit(f"the first row has loss {from_loader:.8f} from the loader, {from_memory:.8f} from memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe that gives the model and the row length")
    parser.add_argument("--samples", type=int, default=320, help="conversations in the shards; 9 of 10 have an image")
    parser.add_argument("--steps", type=int, default=24, help="timed steps, one row each")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4, 8], help="numbers of worker processes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of_shards(arguments.config, Path(folder), arguments.samples)
        with distributed(recipe.parallel):
            run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run the benchmark and report it."""
    torch.manual_seed(0)
    with torch.device(current_device()):
        weights = transformers_loop.build(recipe)
    loop = PackedLoop(weights, recipe)
    del weights  # frees its memory before timing
    rows = rows_in_memory(recipe, max(arguments.workers), WARMUP_STEPS + arguments.steps)
    check_same_loss(loop, recipe, rows[0])
    pass_from_memory(loop, rows)  # compiles kernels for every shape
    passes = [pass_from_memory(loop, rows)]
    passes += [pass_from_loader(loop, recipe, workers, arguments.steps) for workers in arguments.workers]
    report(arguments, recipe, rows[WARMUP_STEPS:], passes)


def report(arguments: argparse.Namespace, recipe: Recipe, rows: list[RankBatch], passes: list[Pass]) -> None:
    """Print the table and write the JSON."""
    tokens, tiles = (sum(getattr(row, name) for row in rows) for name in ("num_tokens", "num_tiles"))
    from_memory = sum(passes[0].seconds)
    lines, results = [], []
    for measured in passes:
        name = "rows in memory" if measured.workers is None else f"loader, {measured.workers} workers"
        elapsed = sum(measured.seconds)
        results.append(
            {
                "name": name,
                "seconds": measured.seconds,
                "tokens_per_second": tokens / elapsed,
                "tiles_per_second": tiles / elapsed,
                "speed_relative_to_memory": from_memory / elapsed,
                "data_wait_fraction": measured.data_wait_seconds / elapsed,
            }
        )
        lines.append(
            [name, f"{statistics.median(measured.seconds):.3f}", f"{tokens / elapsed:,.0f}", f"{tiles / elapsed:.0f}",
             f"{100 * from_memory / elapsed:.1f} %", f"{100 * measured.data_wait_seconds / elapsed:.1f} %"]
        )  # fmt: skip
    about = machine()
    print(
        f"\n{about['device']}, {about['cores']} cores, torch {about['torch']}; {len(rows)} steps of one row of "
        f"{recipe.data.seq_length} tokens: {tokens:,} tokens, {tiles} tiles\n"
    )
    print(table(["rows from", "s per step", "tokens/s", "tiles/s", "speed", "data wait"], lines))
    settings = {"samples": arguments.samples, "steps": arguments.steps, "seq_length": recipe.data.seq_length}
    name = f"feeding-{about['device'].lower().replace(' ', '-')}"
    path = save(arguments.output, name, {"settings": settings, "tokens": tokens, "tiles": tiles, "passes": results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
