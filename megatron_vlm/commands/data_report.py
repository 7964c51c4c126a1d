"""Write an HTML report on the data: plots per dataset, packing, example samples and suspicious samples.

megatron-vlm data-report MIX.yaml --output DIR --config RECIPE.yaml

The first argument, a mixture or other data, replaces the recipe's data_path. All training flags are accepted
(--tokenizer-model, --data-root, --image-folder, ...). The report is DIR/index.html, which needs no other file and no
network. The suspicious samples are also listed in DIR/suspects.jsonl. Plots need matplotlib, which the extra `data`
installs.
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

from megatron_vlm.commands.failures import describe
from megatron_vlm.commands.number_flags import positive_int
from megatron_vlm.config import ConfigError, Recipe, parse_command_line
from megatron_vlm.config.command_line import Complete, keep_given
from megatron_vlm.data.dataset import max_sample_tokens, open_dataset, open_plan_cache
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.length_index import REJECTED, LengthIndex
from megatron_vlm.data.packing.epoch_plan import EpochPlan
from megatron_vlm.data.packing.row_cost import row_cost
from megatron_vlm.data.plan_fingerprint import plan_inputs
from megatron_vlm.data.report import html as report_page
from megatron_vlm.data.report import plots as report_plots
from megatron_vlm.data.report.html import section
from megatron_vlm.data.report.inspection import DataView, grid_of, read_samples
from megatron_vlm.data.report.plots import compact
from megatron_vlm.data.report.row_picture import RowPicture, draw_packed_rows
from megatron_vlm.data.report.sections import oversized_section, scripts_section, template_section

_DATA_RANKS = (8, 64, 256)


class Report:
    """The report on the data of one recipe."""

    def __init__(self, recipe: Recipe, output: Path, examples: int) -> None:
        self.recipe, self.output, self.examples = recipe, output, examples
        self.oversized = recipe.data.oversized_samples
        if self.oversized == "error":
            recipe.data.oversized_samples = "skip"  # they are listed as suspicious, and the rest is packed
        self.data = DataView(recipe)
        self.sources = self.data.mixture.sources.sources
        self.names = short_names([source.name for source in self.sources])
        self.indexes: list[LengthIndex] = self.data.indexes()
        self.tokens = np.concatenate([index.tokens for index in self.indexes])
        self.tiles = np.concatenate([index.tiles for index in self.indexes])
        self.sizes = np.concatenate([index.sizes for index in self.indexes])
        self.usable = self.tokens != REJECTED
        self.truncations = self.data.truncations(self.indexes)
        max_tokens, max_tiles = self._limits()
        fits = (self.tokens <= max_tokens) & (self.tiles <= max_tiles)
        self.epoch_tokens, self.epoch_tiles = self.tokens.copy(), self.tiles.copy()
        if self.oversized == "truncate":
            starts = self.data.mixture.sources.starts[:-1].tolist()
            for start, found in zip(starts, self.truncations, strict=True):
                kept = found.turns > 0
                numbers = found.samples[kept] + start
                self.epoch_tokens[numbers], self.epoch_tiles[numbers] = found.tokens[kept], found.tiles[kept]
                fits[numbers] = True
        self.selected = self.data.mixture.select(self.usable & fits, recipe.training.seed, 0)

    def write(self) -> Path:
        """Write the report. Returns the path of the page."""
        self.output.mkdir(parents=True, exist_ok=True)
        suspects, scripts = read_samples(self.data, self.indexes)
        listing = self.output / "suspects.jsonl"
        listing.write_text("".join(json.dumps(vars(suspect)) + "\n" for suspect in suspects), encoding="utf-8")
        recipe, data_path = self.recipe, ", ".join(self.recipe.data.data_path)
        parts = [
            "<h1>Data report</h1>",
            f"<p class=quiet>{report_page.text(data_path)}</p>",
            self._overview(len(suspects)),
            self._datasets(),
            template_section(self.data.tokenizer, recipe.data.chat_template),
            *(self._lengths() if self.usable.any() else []),
            oversized_section(self.names, self.indexes, self.truncations, self.oversized, self._limits()),
            scripts_section(self.names, scripts),
            self._packing(),
            section("Suspicious samples", report_page.suspects(suspects, listing.name)),
            section("Examples", "<p>As the model sees them.</p>", report_page.KEY, *self._examples()),
        ]
        page = self.output / "index.html"
        page.write_bytes(report_page.page(f"Data report: {data_path}", parts))
        return page

    def _limits(self) -> tuple[int, int]:
        """Tokens and tiles that a sample may have."""
        return max_sample_tokens(self.recipe), self.recipe.data.max_tiles_per_row

    def _overview(self, suspects: int) -> str:
        epoch = np.concatenate(self.selected)
        return report_page.cards(
            [
                (compact(len(self.sources)), "datasets"),
                (compact(len(self.tokens)), "samples"),
                (compact(len(self.tokens) - int(self.usable.sum())), "rejected"),
                (compact(suspects), "suspicious"),
                (compact(len(self.sizes)), "images"),
                (compact(len(epoch)), "samples per epoch"),
                (compact(self.epoch_tokens[epoch].sum(dtype=np.int64)), "tokens per epoch"),
                (compact(self.epoch_tiles[epoch].sum(dtype=np.int64)), "tiles per epoch"),
            ]
        )

    def _datasets(self) -> str:
        """The first epoch: a table by mixture entry, bars by dataset."""
        rows, sums = [], np.zeros((len(self.sources), 3), np.int64)
        total = max(int(self.epoch_tokens[np.concatenate(self.selected)].sum(dtype=np.int64)), 1)
        samples = rejected = 0
        for (source, rule), members in zip(self.data.mixture.entries, self.selected, strict=True):
            index, count = self.indexes[source], len(members)
            lengths = (self.epoch_tokens, self.epoch_tiles)
            tokens, tiles = (int(of_samples[members].sum(dtype=np.int64)) for of_samples in lengths)
            sums[source] += (count, tokens, tiles)
            samples, rejected = samples + len(index.tokens), rejected + len(index.rejected)
            of_source = (len(index.tokens), len(index.rejected))
            rows.append(_row(self.names[source], str(rule), *of_source, count, tokens, tiles, total))
        count, tokens, tiles = map(int, sums.sum(axis=0))
        rows.append(_row("all", "", samples, rejected, count, tokens, tiles, total))
        header = ("dataset", "rule", "samples", "rejected", "per epoch", "tokens", "tiles", "tokens / sample",
                  "share of tokens")  # fmt: skip
        bars = report_page.png_image(report_plots.draw_datasets(self.names, sums), "samples, tokens, tiles per dataset")
        return section("The first epoch", report_page.table(header, rows, text_columns=2, total=True), bars)

    def _lengths(self) -> list[str]:
        tokens, tiles = self.tokens[self.usable], self.tiles[self.usable]
        median, high = (compact(value) for value in np.percentile(tokens, (50, 99)))
        about = f"Tokens per sample: median {median}, 99th percentile {high}, maximum {tokens.max():,}."
        png = report_plots.draw_lengths(tokens, tiles, self.recipe.data.seq_length)
        parts = [section("Lengths", f"<p>{about}</p>", report_page.png_image(png, "tokens and tiles per sample"))]
        if len(self.sizes):
            sizes, counts = np.unique(self.sizes, axis=0, return_counts=True)
            grids: Counter[tuple[int, int]] = Counter()
            for width, height, count in np.column_stack([sizes, counts]).tolist():
                grids[grid_of((width, height), self.data.geometry)] += count
            plots = (report_plots.draw_images(self.sizes), report_plots.draw_grids(dict(grids)))
            images = (report_page.png_image(png, "sizes and grids of images") for png in plots)
            parts.append(section("Images", *images))
        return parts

    def _packing(self) -> str:
        try:
            opened = open_dataset(self.recipe, is_logging_rank=False)
            plan = open_plan_cache(self.recipe, opened, plan_inputs(self.recipe, opened))(0)
        except DataError as error:
            return section("Packing", f"<p>Cannot be packed: {report_page.text(error)}</p>")
        data = self.recipe.data
        efficiency, tiles, cost = row_sums(self.recipe, plan, opened.tokens, opened.tiles)
        text = (
            f"<p>{len(plan.members):,} samples in {plan.rows:,} rows of {data.seq_length:,} tokens, "
            f"{len(plan.members) / plan.rows:.1f} per row; packing efficiency {plan.packing_efficiency:.2%}.</p>"
        )
        balance = [(f"{ranks}", f"{plan.rows // ranks:,}", f"{balance_over(cost, ranks):.3f}")
                   for ranks in _DATA_RANKS if plan.rows >= ranks]  # fmt: skip
        if balance:
            header = ("data ranks", "steps", "most expensive row / mean cost, averaged over steps")
            text += report_page.table(header, balance, text_columns=0)
        return section(
            "Packing of the first epoch", text,
            report_page.png_image(report_plots.draw_rows(efficiency, tiles, cost, data.max_tiles_per_row), "rows"),
            report_page.png_image(report_plots.draw_cost_over_epoch(cost), "cost of rows over the epoch"),
            self._row_picture(plan, cost, opened.truncations),
        )  # fmt: skip

    def _row_picture(self, plan: EpochPlan, cost: np.ndarray, truncations: dict[int, tuple[int, int]]) -> str:
        try:
            png = draw_packed_rows(self._rows(plan, cost, truncations), self.recipe.data.seq_length)
        except SampleError as error:  # its image changed since it was measured
            return f"<p>{report_page.text(error)}</p>"
        return report_page.png_image(png, "the tokens of some rows")

    def _rows(self, plan: EpochPlan, cost: np.ndarray, truncations: dict[int, tuple[int, int]]) -> list[RowPicture]:
        """The cheapest row, one of median cost and the most expensive one; fewer, if there are fewer."""
        order = np.argsort(cost, kind="stable")
        chosen = dict.fromkeys(order[[0, len(order) // 2, -1]].tolist())
        return [
            RowPicture(
                row, float(cost[row] / cost.mean()),
                [self.data.view(number, truncations.get(number, (None, 0))[0])
                 for number in plan.members[slice(*plan.row_starts[row : row + 2])].tolist()],
            )
            for row in chosen
        ]  # fmt: skip

    def _examples(self) -> list[str]:
        """Examples from all datasets in turn."""
        rng = np.random.default_rng(self.recipe.training.seed)
        starts = self.data.mixture.sources.starts
        pools = []
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            pools.append((start + rng.permutation(np.flatnonzero(self.usable[start:stop]))).tolist())
        pools = [pools[index] for index in rng.permutation(len(pools))]
        shown: list[str] = []
        while len(shown) < self.examples and any(pools):
            for pool in filter(None, pools):
                if len(shown) < self.examples:
                    try:
                        shown.append(report_page.example(self.data.view(pool.pop())))
                    except SampleError as error:
                        shown.append(f"<p>{report_page.text(error)}</p>")
        return shown


def _row(name: str, rule: str, size: int, rejected: int, count: int, tokens: int, tiles: int, total: int) -> list[str]:
    counts = [f"{number:,}" for number in (size, rejected, count, tokens, tiles)]
    return [name, rule, *counts, f"{tokens / max(count, 1):,.0f}", f"{100 * tokens / total:.2f} %"]


def row_sums(
    recipe: Recipe, plan: EpochPlan, tokens: np.ndarray, tiles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packing efficiency (0 to 1), tiles and cost of each row of a plan."""
    lengths, counts, starts = tokens[plan.members], tiles[plan.members], plan.row_starts[:-1]
    efficiency = np.add.reduceat(lengths, starts, dtype=np.int64) / recipe.data.seq_length
    return efficiency, np.add.reduceat(counts, starts), np.add.reduceat(row_cost(recipe).of(lengths, counts), starts)


def balance_over(cost: np.ndarray, ranks: int) -> float:
    """Largest over mean cost of `ranks` consecutive rows, averaged over all such steps."""
    steps = cost[: len(cost) // ranks * ranks].reshape(-1, ranks)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean())


def short_names(paths: list[str]) -> list[str]:
    """The shortest suffixes of the paths that differ from each other."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def main(argv: list[str] | None = None, prog: str | None = None, complete: Complete = keep_given) -> int:
    """Exit code: 0, or 2 if the data cannot be opened. `complete` fills in settings not given."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--examples", type=positive_int, default=12, metavar="N", help="number of example samples; default: 12"
    )
    options, rest = parser.parse_known_args(argv)
    data_path = rest[:1] if rest and not rest[0].startswith("-") else []
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_vlm").setLevel(logging.INFO)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise DataError("plots need matplotlib, which is not installed: pip install matplotlib")
        recipe, parsed = parse_command_line(rest[len(data_path) :])
        complete(recipe, parsed.given)
        recipe.data.data_path = data_path or recipe.data.data_path
        page = Report(recipe, options.output, options.examples).write()
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0
