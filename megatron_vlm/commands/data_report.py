"""Write a page that shows what is in the data: plots per data set, the packing, examples, suspicious samples.

megatron-vlm data-report MIX.yaml --output DIR --config RECIPE.yaml

The mixture, or any other data, comes first and takes the place of the recipe's data_path. All flags of training are
understood (--tokenizer-model, --data-root, --image-folder, ...). Writes DIR/index.html, a page that needs no other file
and no network, and DIR/suspects.jsonl. Plots need matplotlib, which the extra `data` installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_vlm.config import ConfigError, Recipe, parse_command_line
from megatron_vlm.data.dataset import open_dataset, open_plan_cache
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.length_index import REJECTED, LengthIndex
from megatron_vlm.data.packing.epoch_plan import EpochPlan
from megatron_vlm.data.packing.row_cost import row_cost
from megatron_vlm.data.plan_fingerprint import plan_inputs
from megatron_vlm.data.report import html as report_page
from megatron_vlm.data.report import plots as report_plots
from megatron_vlm.data.report.html import section
from megatron_vlm.data.report.inspection import DataView, find_suspects, grid_of
from megatron_vlm.data.report.plots import compact

_RANKS = (8, 64, 256)


class Report:
    """Numbers and pictures of one recipe's data."""

    def __init__(self, recipe: Recipe, output: Path, examples: int) -> None:
        self.recipe, self.output, self.examples = recipe, output, examples
        recipe.data.oversized_samples = "skip"  # what is longer than a row is listed, and the rest can still be packed
        self.data = DataView(recipe)
        self.sources = self.data.mixture.sources.sources
        self.names = short_names([source.name for source in self.sources])
        self.indexes: list[LengthIndex] = self.data.indexes()
        self.tokens = np.concatenate([index.tokens for index in self.indexes])
        self.tiles = np.concatenate([index.tiles for index in self.indexes])
        self.sizes = np.concatenate([index.sizes for index in self.indexes])
        self.usable = self.tokens != REJECTED
        fits = (self.tokens <= recipe.data.seq_length) & (self.tiles <= recipe.data.max_tiles_per_row)
        self.drawn = self.data.mixture.select(self.usable & fits, recipe.training.seed, 0)

    def write(self) -> Path:
        """Everything; returns the page."""
        self.output.mkdir(parents=True, exist_ok=True)
        suspects = find_suspects(self.data, self.indexes)
        listing = self.output / "suspects.jsonl"
        listing.write_text("".join(json.dumps(vars(suspect)) + "\n" for suspect in suspects), encoding="utf-8")
        told = ", ".join(self.recipe.data.data_path)
        parts = [
            "<h1>What is in the data</h1>",
            f"<p class=quiet>{report_page.text(told)}</p>",
            self._overview(len(suspects)),
            self._sets(),
            *(self._lengths() if self.usable.any() else []),
            self._packing(),
            section("Suspicious samples", report_page.suspects(suspects, listing.name)),
            section("Examples", "<p>As the model reads them.</p>", report_page.KEY, *self._examples()),
        ]
        page = self.output / "index.html"
        page.write_bytes(report_page.page(f"Data of {told}", parts))
        return page

    def _overview(self, suspects: int) -> str:
        everything = np.concatenate(self.drawn)
        return report_page.cards(
            [
                (compact(len(self.sources)), "data sets"),
                (compact(len(self.tokens)), "samples"),
                (compact(len(self.tokens) - int(self.usable.sum())), "refused"),
                (compact(suspects), "suspicious"),
                (compact(len(self.sizes)), "images"),
                (compact(len(everything)), "samples of an epoch"),
                (compact(self.tokens[everything].sum(dtype=np.int64)), "tokens of an epoch"),
                (compact(self.tiles[everything].sum(dtype=np.int64)), "tiles of an epoch"),
            ]
        )

    def _sets(self) -> str:
        """The first epoch: a table by use, bars by data set."""
        rows, sums = [], np.zeros((len(self.sources), 3), np.int64)
        total = max(int(self.tokens[np.concatenate(self.drawn)].sum(dtype=np.int64)), 1)
        held = refused = 0
        for (place, rule), members in zip(self.data.mixture.entries, self.drawn, strict=True):
            index, taken = self.indexes[place], len(members)
            tokens, tiles = (int(lengths[members].sum(dtype=np.int64)) for lengths in (self.tokens, self.tiles))
            sums[place] += (taken, tokens, tiles)
            held, refused = held + len(index.tokens), refused + len(index.rejected)
            rows.append(_row(self.names[place], str(rule), len(index.tokens), len(index.rejected), taken, tokens, tiles,
                             total))  # fmt: skip
        taken, tokens, tiles = map(int, sums.sum(axis=0))
        rows.append(_row("all", "", held, refused, taken, tokens, tiles, total))
        header = ("data set", "rule", "samples", "refused", "of an epoch", "tokens", "tiles", "tokens / sample",
                  "share of tokens")  # fmt: skip
        bars = report_page.picture(report_plots.draw_sets(self.names, sums), "samples, tokens, tiles of each data set")
        return section("The first epoch", report_page.table(header, rows, words=2, total=True), bars)

    def _lengths(self) -> list[str]:
        tokens, tiles = self.tokens[self.usable], self.tiles[self.usable]
        median, high = (compact(value) for value in np.percentile(tokens, (50, 99)))
        told = f"Half of the samples have at most {median} tokens, 99 % at most {high}, the longest {tokens.max():,}."
        png = report_plots.draw_lengths(tokens, tiles, self.recipe.data.seq_length)
        parts = [section("Lengths", f"<p>{told}</p>", report_page.picture(png, "tokens and tiles of samples"))]
        if len(self.sizes):
            kinds, counts = np.unique(self.sizes, axis=0, return_counts=True)
            grids: Counter[tuple[int, int]] = Counter()
            for width, height, count in np.column_stack([kinds, counts]).tolist():
                grids[grid_of((width, height), self.data.geometry)] += count
            pictures = (report_plots.draw_images(self.sizes), report_plots.draw_grids(dict(grids)))
            parts.append(
                section("Images", *(report_page.picture(png, "sizes and grids of images") for png in pictures))
            )
        return parts

    def _packing(self) -> str:
        try:
            opened = open_dataset(self.recipe, is_logging_rank=False)
            plan = open_plan_cache(self.recipe, opened, plan_inputs(self.recipe, opened))(0)
        except DataError as error:
            return section("Packing", f"<p>Cannot be packed: {report_page.text(error)}</p>")
        data = self.recipe.data
        fill, tiles, cost = row_sums(self.recipe, plan, opened.tokens, opened.tiles)
        told = (
            f"<p>{plan.rows:,} rows of {data.seq_length:,} tokens hold {len(plan.members):,} samples, "
            f"{len(plan.members) / plan.rows:.1f} each; they are filled to {100 * plan.packing_efficiency:.2f} %.</p>"
        )
        balance = [(f"{ranks}", f"{plan.rows // ranks:,}", f"{balance_over(cost, ranks):.3f}")
                   for ranks in _RANKS if plan.rows >= ranks]  # fmt: skip
        if balance:
            header = ("rows at the same time", "steps", "largest / mean cost, mean of the steps")
            told += report_page.table(header, balance, words=0)
        return section(
            "Packing of the first epoch", told,
            report_page.picture(report_plots.draw_rows(fill, tiles, cost, data.max_tiles_per_row), "rows"),
            report_page.picture(report_plots.draw_course(cost), "cost of rows along the epoch"),
        )  # fmt: skip

    def _examples(self) -> list[str]:
        """Of all data sets in turn."""
        rng = np.random.default_rng(self.recipe.training.seed)
        starts = self.data.mixture.sources.starts
        pools = []
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            pools.append((start + rng.permutation(np.flatnonzero(self.usable[start:stop]))).tolist())
        pools = [pools[place] for place in rng.permutation(len(pools))]
        shown: list[str] = []
        while len(shown) < self.examples and any(pools):
            for pool in filter(None, pools):
                if len(shown) < self.examples:
                    try:
                        shown.append(report_page.example(self.data.view(pool.pop())))
                    except SampleError as error:
                        shown.append(f"<p>{report_page.text(error)}</p>")
        return shown


def _row(name: str, rule: str, held: int, refused: int, taken: int, tokens: int, tiles: int, total: int) -> list[str]:
    counts = [f"{number:,}" for number in (held, refused, taken, tokens, tiles)]
    return [name, rule, *counts, f"{tokens / max(taken, 1):,.0f}", f"{100 * tokens / total:.2f} %"]


def row_sums(
    recipe: Recipe, plan: EpochPlan, tokens: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill (0 to 1), tiles and cost of each row of a plan."""
    lengths, counts, starts = tokens[plan.members], tiles[plan.members], plan.row_starts[:-1]
    fill = np.add.reduceat(lengths, starts, dtype=np.int64) / recipe.data.seq_length
    return fill, np.add.reduceat(counts, starts), np.add.reduceat(row_cost(recipe).of(lengths, counts), starts)


def balance_over(cost: np.ndarray, ranks: int) -> float:
    """Largest over mean cost of `ranks` rows that follow each other, the mean over all such steps."""
    steps = cost[: len(cost) // ranks * ranks].reshape(-1, ranks)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean())


def short_names(paths: list[str]) -> list[str]:
    """Ends of paths, as short as they can be told apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0, or 2 if the data cannot be opened."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--examples", type=int, default=12, metavar="N", help="samples shown in full; default: 12")
    options, rest = parser.parse_known_args(argv)
    named = rest[:1] if rest and not rest[0].startswith("-") else []
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_vlm").setLevel(logging.INFO)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise DataError("plots need matplotlib, which is not installed: pip install matplotlib")
        recipe, _ = parse_command_line(rest[len(named) :])
        recipe.data.data_path = named or recipe.data.data_path
        page = Report(recipe, options.output, options.examples).write()
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0
