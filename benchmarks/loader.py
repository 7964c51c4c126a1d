"""Our loader against the pure limit of decoding and tiling, transformers' processor and mosaicml-streaming's loader.

    python -m benchmarks.loader

All make the same tiles, float32 and normalised, of the same images, taking turns. What is compared is CPU time, that
of the worker processes included: it says what a core yields, also on a machine that others use. Cores that work at the
same time slow each other down, so what runs in two workers is held against two bare loops at once, each with half of
the rows. Wall clock is printed beside it. Our loader and mosaicml-streaming's also read the shards, tokenize and label;
the limit and transformers start from image files in memory and do images alone.
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

from benchmarks import loader_peers
from benchmarks.pictures import shards_of_pictures
from benchmarks.report import RESULTS, machine, save, table
from megatron_vlm.config import DataConfig, ModelConfig, ParallelConfig, Recipe, TrainingConfig
from megatron_vlm.data.dataset import MixtureDataset, open_dataset, open_plan_cache
from megatron_vlm.data.loader import RowLoader
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.plan_fingerprint import plan_inputs
from megatron_vlm.data.row_builder import RowBuilder

OURS, LIMIT, STREAMING, TRANSFORMERS = (
    "megatron-vlm", "pure limit", "mosaicml-streaming, same transform", "transformers processor",
)  # fmt: skip
SAME_TILES = 1e-3
"""Allowed between transformers' tiles and ours; all others are equal bit for bit."""


@dataclass
class Spent:
    """One pass through all images."""

    wall: float
    cpu: float
    """CPU seconds of this process and its workers."""
    main: float
    """Those of this process alone."""


class Work:
    """The shards, opened, and every way to go through them."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.recipe = _recipe(folder, samples)
        self.opened: MixtureDataset = open_dataset(self.recipe, is_logging_rank=False)
        self.plan = RowPlan(open_plan_cache(self.recipe, self.opened, plan_inputs(self.recipe, self.opened)))
        self.geometry = self.opened.geometry
        rows = [self.plan.row(counter).members.tolist() for counter in range(self.plan.rows)]
        sources = self.opened.mixture.sources
        stored = [[sources.sample(number) for number in row] for row in rows]
        self.files = [[s.read_image(place) for s in row for place in range(len(s.image_names))] for row in stored]
        self.samples, self.images = sum(map(len, rows)), sum(map(len, self.files))
        self.tiles = int(self.opened.tiles.sum())
        self._limit = loader_peers.PureLimit(self.geometry, self.recipe.data.max_tiles_per_row)
        self._processed = loader_peers.ProcessedImages([file for row in self.files for file in row], self.geometry)

    def streamed(self, workers: int) -> Any:
        """mosaicml-streaming's dataset, for passes with this number of workers."""
        shards = Path(self.recipe.data.data_path[0])
        link = shards.with_name(f"shards-{workers}")
        link.symlink_to(shards)
        return loader_peers.streamed_samples(
            link, self.opened.tokenizer, self.geometry, self.recipe.model.image_token_index, self.plan.rows
        )

    def ours(self, workers: int) -> Iterator[torch.Tensor]:
        """The tiles of the loader's rows, normalised here as the model does when it encodes them."""
        opened, data = self.opened, self.recipe.data
        builder = RowBuilder(
            opened.mixture.sources, opened.indexes, opened.tokenizer, self.geometry,
            self.recipe.model.image_token_index, data.seq_length, (0, 1),
        )  # fmt: skip
        rows = (self.plan.row(counter) for counter in range(self.plan.rows))
        for batch in RowLoader(self.plan, builder, {}, rows, workers):
            assert batch.tiles is not None
            yield from loader_peers.normalised(batch.tiles, self.geometry)

    def passes(self, workers: Iterable[int]) -> dict[tuple[str, int], Callable[[], Iterator[Any]]]:
        """Everything that is measured, by name and number of workers."""
        found: dict[tuple[str, int], Callable[[], Iterator[Any]]] = {}
        for count in workers:
            found[LIMIT, count] = partial(self._limit.passes_through, self.files, max(count, 1))
            found[OURS, count] = partial(self.ours, count)
            found[STREAMING, count] = partial(loader_peers.streaming_pass, self.streamed(count), self.geometry, count)
            found[TRANSFORMERS, count] = partial(loader_peers.transformers_pass, self._processed, count)
        return found

    def check_same_tiles(self) -> float:
        """The tiles of the first rows from ours, the limit and transformers; the largest difference to transformers."""
        limit = self._limit.pass_through(self.files)
        theirs = loader_peers.transformers_pass(self._processed, 0)
        largest = 0.0
        ours = self.ours(0)
        for row, expected in zip(self.files[:2], limit, strict=False):
            tiles, count = next(ours), len(expected)
            while len(tiles) < count:
                tiles = torch.cat([tiles, next(ours)])
            if not np.array_equal(tiles.numpy(), expected):
                raise SystemExit("our tiles are not those of the pure limit")
            other = torch.cat([next(theirs) for _ in row])
            largest = max(largest, float((other - tiles).abs().max()))
        if largest > SAME_TILES:
            raise SystemExit(f"our tiles are not transformers': a value differs by {largest}")
        return largest

    def measure(self, tiles_of_all: Callable[[], Iterator[Any]]) -> Spent:
        """One pass."""
        started = time.perf_counter(), *map(_cpu_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        count = sum(len(tiles) for tiles in tiles_of_all())
        ended = time.perf_counter(), *map(_cpu_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        if count != self.tiles:
            raise SystemExit(f"{count} tiles where {self.tiles} were expected: not the same work")
        wall, main, children = (end - start for start, end in zip(started, ended, strict=True))
        return Spent(wall, main + children, main)


def _cpu_seconds(who: int) -> float:
    """Of this process, or of all its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _recipe(folder: Path, samples: int) -> Recipe:
    """Shards of drawn images below `folder`, at the real tile size, grids and row length."""
    shards, tokenizer, words = shards_of_pictures(folder, samples)
    data = DataConfig(data_path=[str(shards)], tokenizer_model=str(tokenizer))
    return Recipe(ModelConfig(image_token_index=words), data, TrainingConfig(), ParallelConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=240, help="conversations, most of them about an image")
    parser.add_argument(
        "--rounds", type=int, default=5, help="passes of each through all of them; medians are reported"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes; 0: none")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # normalising; workers have one thread anyway
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), arguments.samples)
        difference = work.check_same_tiles()
        passes = work.passes(arguments.workers)
        spent: dict[tuple[str, int], list[Spent]] = {key: [] for key in passes}
        names = list(passes)
        for number in range(arguments.rounds):
            turn = number % len(names)
            for key in names[turn:] + names[:turn]:
                spent[key].append(work.measure(passes[key]))
    report(arguments, work, spent, difference)


def report(
    arguments: argparse.Namespace, work: Work, spent: dict[tuple[str, int], list[Spent]], difference: float
) -> None:
    """Print the table and write the JSON. Ratios: medians over rounds, each to the limit of its round and workers."""
    lines, results = [], []
    for (name, workers), passes in spent.items():
        limit = spent[LIMIT, workers]
        cpu, wall = (statistics.median(getattr(p, kind) for p in passes) for kind in ("cpu", "wall"))
        yields = statistics.median(bare.cpu / p.cpu for bare, p in zip(limit, passes, strict=True))
        results.append(
            {
                "name": name,
                "workers": workers,
                "samples_per_cpu_second": work.samples / cpu,
                "tiles_per_cpu_second": work.tiles / cpu,
                "tiles_per_second": work.tiles / wall,
                "cpu_against_limit": yields,
                "wall_against_limit": statistics.median(b.wall / p.wall for b, p in zip(limit, passes, strict=True)),
                "passes": [vars(p) for p in passes],
            }
        )
        lines.append(
            [name, str(workers), f"{work.samples / cpu:.1f}", f"{work.tiles / cpu:.0f}", f"{100 * yields:.1f} %",
             f"{work.tiles / wall:.0f}"]
        )  # fmt: skip
    ours = {
        workers: {
            name: statistics.median(
                o.cpu / m.cpu for o, m in zip(spent[name, workers], spent[OURS, workers], strict=True)
            )
            for name in (STREAMING, TRANSFORMERS)
        }
        for workers in arguments.workers
    }
    about = machine()
    print(f"{about['device']}, {about['cores']} cores, torch {about['torch']}, transformers {about['transformers']}")
    print(
        f"{work.samples} samples, {work.images} images, {work.tiles} tiles, {work.plan.rows} rows of "
        f"{work.recipe.data.seq_length}; median of {arguments.rounds} passes; tiles equal the limit's bit for bit, "
        f"transformers' within {difference:.0e}\n"
    )
    print(table(["loader", "workers", "samples/CPU s", "tiles/CPU s", "of the limit", "tiles/s"], lines))
    for workers, peers in ours.items():
        told = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in peers.items())
        print(f"\nours with {workers} workers, per CPU second: {told}", end="")
    print()
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
            "ours_is_faster_by": ours,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
