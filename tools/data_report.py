"""Write a page that shows what is in the data: plots per data set, the packing, examples, suspicious samples.

python tools/data_report.py MIX.yaml --output DIR --config RECIPE.yaml

The mixture, or any other data, comes first and takes the place of the recipe's data_path. All flags of training are
understood (--tokenizer-model, --data-root, --image-folder, ...). Needs matplotlib. Writes DIR/index.html, its plots as
PNG, and DIR/suspects.jsonl.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config import ConfigError, Recipe, parse_command_line
from megatron_vlm.data.cost import row_cost
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.inspection import DataView, SampleView, Suspect, find_suspects, grid_of
from megatron_vlm.data.lengths import REFUSED, LengthIndex
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.mixture import describe_mixture

_MOST_LISTED = 200
_MOST_BARS = 40
_BLUE, _ORANGE, _GREEN = "#4477aa", "#ee7733", "#228833"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } pre { overflow-x: auto; font-size: 12px } table { border-collapse: collapse; font-size: 13px }
td, th { text-align: left; padding: 2px 10px 2px 0; vertical-align: top; border-bottom: 1px solid #ddd }
.row { font: 13px/1.6 monospace; white-space: pre-wrap; border: 1px solid #ccc; padding: 8px; margin: 6px 0 18px }
.answer { background: #cdebc5 } .image { background: #cfe0f5 } .prompt { color: #555 }
"""


class Report:
    """Numbers and pictures of one recipe's data."""

    def __init__(self, recipe: Recipe, output: Path, examples: int) -> None:
        self.recipe, self.output, self.examples = recipe, output, examples
        self.data = DataView(recipe)
        self.indexes: list[LengthIndex] = self.data.indexes()
        self.tokens = np.concatenate([index.tokens for index in self.indexes])
        self.tiles = np.concatenate([index.tiles for index in self.indexes])
        self.usable = self.tokens != REFUSED
        self.sizes = np.concatenate([index.sizes for index in self.indexes])
        output.mkdir(parents=True, exist_ok=True)

    def write(self) -> Path:
        """Everything; returns the page."""
        suspects = find_suspects(self.data, self.indexes)
        (self.output / "suspects.jsonl").write_text("".join(json.dumps(vars(s)) + "\n" for s in suspects))
        fits = (self.tokens <= self.recipe.data.seq_length) & (self.tiles <= self.recipe.data.max_tiles_per_row)
        table = describe_mixture(
            self.data.mixture, self.usable & fits, self.tokens, self.tiles, self.recipe.training.seed
        )
        parts = [
            f"<h1>Data of {html.escape(', '.join(self.recipe.data.data_path))}</h1>",
            f"<p>{len(self.tokens):,} samples, {int(self.usable.sum()):,} usable, {len(self.sizes):,} images.</p>",
            f"<h2>The first epoch</h2><pre>{html.escape(table)}</pre>",
            self._plot("mixture", self._draw_mixture, "Samples, tokens and tiles of each data set in the first epoch"),
            self._plot("lengths", self._draw_lengths, "Tokens of a sample, images included"),
            self._plot("images", self._draw_images, "Image sizes"),
            self._plot("grids", self._draw_grids, "Grids that images are cut at, columns x rows"),
            self._packing(),
            f"<h2>Suspicious samples</h2>{_suspects(suspects)}",
            "<h2>Examples</h2><p>As the model reads them: <span class=answer>learned</span>, "
            "<span class=image>image positions</span>, <span class=prompt>read only</span>.</p>",
            *self._examples(),
        ]
        page = self.output / "index.html"
        page.write_text(
            f"<!doctype html><meta charset=utf-8><title>Data report</title><style>{_STYLE}</style>\n"
            + "\n".join(parts),
            encoding="utf-8",
        )
        return page

    def _plot(self, name: str, draw: Any, title: str) -> str:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = draw(pyplot)
        figure.tight_layout()
        figure.savefig(self.output / f"{name}.png", dpi=110)
        pyplot.close(figure)
        return f"<h2>{html.escape(title)}</h2><img src={name}.png alt='{html.escape(title)}'>"

    def _draw_mixture(self, pyplot: Any) -> Any:
        mixture = self.data.mixture
        numbers: Counter[str] = Counter()
        sums: dict[str, np.ndarray] = {}
        drawn = mixture.draw_uses(self.usable, self.recipe.training.seed, 0)
        for (place, _), members in zip(mixture.uses, drawn, strict=True):
            name = Path(mixture.sources.sources[place].name).name
            counts = np.array([len(members), self.tokens[members].sum(), self.tiles[members].sum()], np.int64)
            sums[name] = sums.get(name, 0) + counts
            numbers[name] = int(sums[name][1])
        names = [name for name, _ in numbers.most_common(_MOST_BARS)][::-1]
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 1.2 + 0.25 * len(names)), sharey=True)
        titles = zip(axes, ("samples", "tokens", "tiles"), (_BLUE, _ORANGE, _GREEN), strict=True)
        for column, (axis, title, colour) in enumerate(titles):
            axis.barh(names, [sums[name][column] for name in names], color=colour)
            axis.set_title(title)
            axis.spines[["top", "right"]].set_visible(False)
            axis.locator_params(axis="x", nbins=4)
        return figure

    def _draw_lengths(self, pyplot: Any) -> Any:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.5))
        lengths = self.tokens[self.usable]
        left.hist(lengths, bins=60, color=_BLUE)
        left.axvline(self.recipe.data.seq_length, color=_ORANGE, label="a row")
        left.set(xlabel="tokens", ylabel="samples", yscale="log")
        left.legend()
        right.hist(self.tiles[self.usable], bins=np.arange(self.tiles.max() + 2) - 0.5, color=_GREEN)
        right.set(xlabel="tiles", ylabel="samples")
        return figure

    def _draw_images(self, pyplot: Any) -> Any:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.5))
        if len(self.sizes):
            width, height = np.maximum(self.sizes, 1).T
            left.hist2d(np.log10(width), np.log10(height), bins=60, cmin=1, cmap="viridis")
            right.hist(np.log2(width / height), bins=60, color=_BLUE)
        left.set(xlabel="log10 width", ylabel="log10 height")
        right.set(xlabel="log2 width / height", ylabel="images")
        return figure

    def _draw_grids(self, pyplot: Any) -> Any:
        kinds, counts = np.unique(self.sizes, axis=0, return_counts=True)
        grids: Counter[tuple[int, int]] = Counter()
        for size, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            grids[grid_of((size[0], size[1]), self.data.geometry)] += count
        figure, axis = pyplot.subplots(figsize=(11, 3))
        names = ["base view alone" if grid == (0, 0) else f"{grid[0]} x {grid[1]}" for grid in sorted(grids)]
        axis.bar(names, [grids[grid] for grid in sorted(grids)], color=_GREEN)
        axis.set(ylabel="images")
        axis.spines[["top", "right"]].set_visible(False)
        return figure

    def _packing(self) -> str:
        try:
            loader = build_loader(self.recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)
        except DataError as error:
            return f"<h2>Packing</h2><p>Cannot be packed: {html.escape(str(error))}</p>"
        lengths = [batch for batch, _ in zip(loader, range(min(loader.plan.rows, 400)), strict=False)]
        summary = loader.summary()
        loader.close()
        cost = row_cost(self.recipe)
        numbers = []
        for batch in lengths:
            padded = batch.num_tokens < len(batch.tokens)
            documents = np.diff(batch.bounds[:-1] if padded else batch.bounds)
            spent = cost.of(documents, np.zeros_like(documents)).sum() + cost.per_tile * batch.num_tiles
            numbers.append((batch.num_tokens / len(batch.tokens), batch.num_tiles, float(spent)))
        fill, tiles, spent = np.array(numbers).T

        def draw(pyplot: Any) -> Any:
            figure, axes = pyplot.subplots(1, 3, figsize=(11, 3))
            for axis, values, label in zip(
                axes, (100 * fill, tiles, spent / spent.mean()), ("fill, %", "tiles", "cost / mean"),
                strict=True,
            ):  # fmt: skip
                axis.plot(values, ".", markersize=3, color=_BLUE)
                axis.set(xlabel="row", ylabel=label)
                axis.set_ylim(bottom=0)
            return figure

        told = f"<p>{summary['rows_per_epoch']:,} rows in the first epoch, filled to {100 * loader.plan.fill:.2f} %; "
        told += f"max / mean of the cost of the rows shown: {spent.max() / spent.mean():.3f}.</p>"
        return self._plot("packing", draw, f"Packing: the first {len(lengths)} rows") + told

    def _examples(self) -> list[str]:
        out = []
        rng = np.random.default_rng(self.recipe.training.seed)
        usable = np.flatnonzero(self.usable)
        for number in sorted(rng.permutation(usable)[: self.examples].tolist()):
            try:
                out.append(_example(self.data.view(number)))
            except SampleError as error:
                out.append(f"<p>{html.escape(str(error))}</p>")
        return out


def _example(view: SampleView) -> str:
    pieces = []
    for span in view.spans:
        text = f"[image, {span.stop - span.start} positions]" if span.kind == "image" else html.escape(span.text)
        pieces.append(f"<span class={span.kind}>{text}</span>")
    images = "".join(
        f"<br>{html.escape(image.name)}: {image.size[0]}x{image.size[1]}, {image.tiles} tiles" for image in view.images
    )
    head = f"{html.escape(view.sample.id)} of {html.escape(view.sample.file)}, {len(view.encoded.ids)} tokens{images}"
    return f"<p>{head}</p><div class=row>{''.join(pieces)}</div>"


def _suspects(suspects: list[Suspect]) -> str:
    if not suspects:
        return "<p>None.</p>"
    counts = Counter(suspect.reason for suspect in suspects).most_common()
    told = ", ".join(f"{html.escape(reason)} {count}" for reason, count in counts)
    rows = "".join(
        f"<tr><td>{html.escape(s.reason)}<td>{html.escape(s.sample_id)}<td>{html.escape(s.source)} #{s.index}"
        f"<td>{html.escape(s.message)}"
        for s in suspects[:_MOST_LISTED]
    )
    more = f"<p>All {len(suspects)} are in suspects.jsonl.</p>" if len(suspects) > _MOST_LISTED else ""
    return f"<p>{told}</p><table><tr><th>reason<th>sample<th>where<th>what{rows}</table>{more}"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 if the data cannot be opened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--examples", type=int, default=12, metavar="N", help="samples shown in full; default: 12")
    options, rest = parser.parse_known_args(argv)
    named = rest[:1] if rest and not rest[0].startswith("-") else []
    try:
        recipe, _ = parse_command_line(rest[len(named) :])
        recipe.data.data_path = named or recipe.data.data_path
        page = Report(recipe, options.output, options.examples).write()
    except (ConfigError, DataError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
