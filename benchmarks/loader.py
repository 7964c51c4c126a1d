"""Speed of our loader, transformers' processor and mosaicml-streaming, relative to a bare loop of decoding and tiling.

    python -m benchmarks.loader

All make the same normalised float32 tiles of the same images, and take turns. CPU time is compared, with that of worker
processes: it is the throughput per core, also on a busy machine. Cores that work at the same time slow each other down,
so two workers are compared with two bare loops in parallel, each with half of the rows. Wall-clock speed is also
printed. Our loader and mosaicml-streaming also read shards, tokenize and make labels; the bare loop and transformers
start from image files in memory and process images only.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support import loader_peers
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.support.synthetic_images import write_image_shards
from megatron_vlm.config import DataConfig, ModelConfig, ParallelConfig, Recipe, TrainingConfig
from megatron_vlm.data.dataset import MixtureDataset, open_dataset, open_plan_cache
from megatron_vlm.data.loader import RowLoader
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.plan_fingerprint import plan_inputs
from megatron_vlm.data.rows.row_builder import RowBuilder

OURS, BARE_LOOP, STREAMING, TRANSFORMERS = (
    "megatron-vlm", "bare loop", "mosaicml-streaming, same transform", "transformers processor",
)  # fmt: skip
TILE_TOLERANCE = 1e-3
"""Largest difference allowed between transformers' tiles and ours; all others must be equal bit for bit."""


@dataclass
class Pass:
    """Seconds of one pass over all images."""

    wall: float
    cpu: float
    """CPU time of this process and its workers."""
    main: float
    """CPU time of this process alone."""


class Workload:
    """The opened shards, and each way to make their tiles."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.recipe = _recipe(folder, samples)
        self.opened: MixtureDataset = open_dataset(self.recipe, is_logging_rank=False)
        self.plan = RowPlan(open_plan_cache(self.recipe, self.opened, plan_inputs(self.recipe, self.opened)))
        self.geometry = self.opened.geometry
        rows = [self.plan.row(index).members.tolist() for index in range(self.plan.rows)]
        sources = self.opened.mixture.sources
        stored = [[sources.sample(number) for number in row] for row in rows]
        self.files = [[s.read_image(index) for s in row for index in range(len(s.image_names))] for row in stored]
        self.samples, self.images = sum(map(len, rows)), sum(map(len, self.files))
        self.tiles = int(self.opened.tiles.sum())
        self._bare_loop = loader_peers.BareLoop(self.geometry, self.recipe.data.max_tiles_per_row)
        self._processed = loader_peers.ProcessedImages([file for row in self.files for file in row], self.geometry)

    def streamed(self, workers: int) -> Any:
        """mosaicml-streaming's dataset for this number of workers."""
        shards = Path(self.recipe.data.data_path[0])
        link = shards.with_name(f"shards-{workers}")
        link.symlink_to(shards)
        return loader_peers.streamed_samples(
            link, self.opened.tokenizer, self.geometry, self.recipe.model.image_token_index, self.plan.rows
        )

    def ours(self, workers: int) -> Iterator[torch.Tensor]:
        """Yield the tiles of the loader's rows, normalised here; in training the model does that on the device."""
        opened, data = self.opened, self.recipe.data
        builder = RowBuilder(
            opened.mixture.sources, opened.indexes, opened.tokenizer, self.geometry,
            self.recipe.model.image_token_index, data.seq_length, (0, 1),
        )  # fmt: skip
        rows = (self.plan.row(index) for index in range(self.plan.rows))
        for batch in RowLoader(self.plan, builder, {}, rows, workers):
            assert batch.tiles is not None
            yield from loader_peers.normalised(batch.tiles, self.geometry)

    def passes(self, workers: Iterable[int]) -> dict[tuple[str, int], Callable[[], Iterator[Any]]]:
        """What to measure, by (name, number of workers)."""
        passes: dict[tuple[str, int], Callable[[], Iterator[Any]]] = {}
        for count in workers:
            passes[BARE_LOOP, count] = partial(self._bare_loop.run_parallel, self.files, max(count, 1))
            passes[OURS, count] = partial(self.ours, count)
            passes[STREAMING, count] = partial(loader_peers.streaming_pass, self.streamed(count), self.geometry, count)
            passes[TRANSFORMERS, count] = partial(loader_peers.transformers_pass, self._processed, count)
        return passes

    def check_same_tiles(self) -> float:
        """Compare the tiles of the first two rows; returns the largest difference between transformers' and ours."""
        bare = self._bare_loop.run(self.files)
        theirs = loader_peers.transformers_pass(self._processed, 0)
        largest = 0.0
        ours = self.ours(0)
        for row, expected in zip(self.files[:2], bare, strict=False):
            tiles, count = next(ours), len(expected)
            while len(tiles) < count:
                tiles = torch.cat([tiles, next(ours)])
            if not np.array_equal(tiles.numpy(), expected):
                raise SystemExit("our tiles differ from those of the bare loop")
            other = torch.cat([next(theirs) for _ in row])
            largest = max(largest, float((other - tiles).abs().max()))
        if largest > TILE_TOLERANCE:
            raise SystemExit(f"our tiles differ from transformers' by up to {largest}")
        return largest

    def measure(self, make_tiles: Callable[[], Iterator[Any]]) -> Pass:
        """Time one pass; raises SystemExit if tiles are missing."""
        start = time.perf_counter(), *map(_cpu_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        count = sum(len(tiles) for tiles in make_tiles())
        end = time.perf_counter(), *map(_cpu_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        if count != self.tiles:
            raise SystemExit(f"{count} tiles instead of {self.tiles}")
        wall, main, children = (after - before for before, after in zip(start, end, strict=True))
        return Pass(wall, main + children, main)


def _cpu_seconds(who: int) -> float:
    """CPU time of this process, or of all its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _recipe(folder: Path, samples: int) -> Recipe:
    """Shards of synthetic images below `folder`, with the default tile size, pinpoints and row length."""
    shards, tokenizer, vocab_size = write_image_shards(folder, samples)
    data = DataConfig(data_path=[str(shards)], tokenizer_model=str(tokenizer))
    return Recipe(ModelConfig(image_token_index=vocab_size), data, TrainingConfig(), ParallelConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=240, help="conversations; 9 of 10 have an image")
    parser.add_argument("--rounds", type=int, default=5, help="passes over all samples; medians are reported")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the workers
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(Path(folder), arguments.samples)
        difference = work.check_same_tiles()
        passes = work.passes(arguments.workers)
        times: dict[tuple[str, int], list[Pass]] = {key: [] for key in passes}
        keys = list(passes)
        for number in range(arguments.rounds):
            first = number % len(keys)
            for key in keys[first:] + keys[:first]:
                times[key].append(work.measure(passes[key]))
    report(arguments, work, times, difference)


def report(
    arguments: argparse.Namespace, work: Workload, times: dict[tuple[str, int], list[Pass]], difference: float
) -> None:
    """Print the table and write the JSON.

    A ratio compares passes of the same round and number of workers; its median over rounds is reported.
    """
    lines, results = [], []
    for (name, workers), passes in times.items():
        bare_passes = times[BARE_LOOP, workers]
        cpu, wall = (statistics.median(getattr(p, kind) for p in passes) for kind in ("cpu", "wall"))
        relative, relative_wall = (
            statistics.median(getattr(b, kind) / getattr(p, kind) for b, p in zip(bare_passes, passes, strict=True))
            for kind in ("cpu", "wall")
        )
        results.append(
            {
                "name": name,
                "workers": workers,
                "samples_per_cpu_second": work.samples / cpu,
                "tiles_per_cpu_second": work.tiles / cpu,
                "tiles_per_second": work.tiles / wall,
                "cpu_relative_to_bare_loop": relative,
                "wall_relative_to_bare_loop": relative_wall,
                "passes": [vars(p) for p in passes],
            }
        )
        lines.append(
            [name, str(workers), f"{work.samples / cpu:.1f}", f"{work.tiles / cpu:.0f}", f"{100 * relative:.1f} %",
             f"{work.tiles / wall:.0f}"]
        )  # fmt: skip
    speedup = {
        workers: {
            name: statistics.median(
                o.cpu / m.cpu for o, m in zip(times[name, workers], times[OURS, workers], strict=True)
            )
            for name in (STREAMING, TRANSFORMERS)
        }
        for workers in arguments.workers
    }
    about = machine()
    print(f"{about['device']}, {about['cores']} cores, torch {about['torch']}, transformers {about['transformers']}")
    print(
        f"{work.samples} samples, {work.images} images, {work.tiles} tiles, {work.plan.rows} rows of "
        f"{work.recipe.data.seq_length}; median of {arguments.rounds} passes; our tiles equal the bare loop's bit for "
        f"bit and transformers' to {difference:.0e}\n"
    )
    print(table(["loader", "workers", "samples/CPU s", "tiles/CPU s", "% of bare loop", "tiles/s"], lines))
    print()
    for workers, peers in speedup.items():
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in peers.items())
        print(f"tiles per CPU second of {OURS} with {workers} workers: {ratios}")
    path = save(
        arguments.output,
        "loader",
        {
            "settings": {"samples": arguments.samples, "rounds": arguments.rounds, "workers": arguments.workers},
            "samples": work.samples,
            "images": work.images,
            "tiles": work.tiles,
            "rows": work.plan.rows,
            "difference_to_transformers": difference,
            "loaders": results,
            "speedup": speedup,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
