"""The plots of the data report. Each function takes arrays and returns the bytes of a PNG.

They need matplotlib, which the extra `data` installs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import numpy as np

Inputs = ParamSpec("Inputs")

BLUE, ORANGE, GREEN, PURPLE = "#3b6ea8", "#d9822b", "#3d8f5f", "#7a5aa6"
_INK, _FAINT = "#1c1c1c", "#d5d8dc"
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.edgecolor": "#777", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip
_WIDTH = 11.0
_MAX_BARS = 40
_MAX_TILES = 40
_TICK_PIXELS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
_RATIOS = {1 / 8: "1:8", 1 / 4: "1:4", 1 / 2: "1:2", 1.0: "1:1", 2.0: "2:1", 4.0: "4:1", 8.0: "8:1"}


def compact(number: float) -> str:
    """A count in short form: 950, 12.3K, 4.6M, 1.2B."""
    if number < 10_000:
        return f"{number:,.0f}"
    number = float(f"{number:.3g}")
    unit, size = next((unit, size) for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if number >= size)
    return f"{number / size:,.4g}{unit}"


def styled_figure(draw: Callable[Inputs, Any]) -> Callable[Inputs, bytes]:
    """Decorator: render the figure that a function returns as PNG, in the common style."""

    @wraps(draw)
    def png(*arguments: Inputs.args, **settings: Inputs.kwargs) -> bytes:
        import matplotlib

        stream = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            draw(*arguments, **settings).savefig(stream, format="png", dpi=140)
        return stream.getvalue()

    return png


def _figure(columns: int, height: float, **settings: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    return figure, figure.subplots(1, columns, squeeze=False, **settings)[0].tolist()


def _format_counts(axis: Any, which: str = "y") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ticks = axis.yaxis if which == "y" else axis.xaxis
    ticks.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    ticks.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid(axis=which, color=_FAINT, linewidth=0.7)


@styled_figure
def draw_datasets(names: Sequence[str], sums: np.ndarray) -> Any:
    """Bars of samples, tokens and tiles of each dataset.

    Args:
        names: of the datasets.
        sums: [datasets, 3] samples, tokens, tiles.
    """
    order = np.argsort(-sums[:, 1], kind="stable")
    shown, rest = order[:_MAX_BARS], order[_MAX_BARS:]
    labels, values = [_shorten(names[index]) for index in shown], sums[shown]
    if len(rest):
        labels, values = [*labels, f"{len(rest)} others"], np.vstack([values, sums[rest].sum(axis=0)])
    return _bars(labels, {"samples": BLUE, "tokens": ORANGE, "tiles": GREEN}, values)


@styled_figure
def draw_scripts(names: Sequence[str], sums: np.ndarray) -> Any:
    """Bars of the samples and the letters of each script.

    Args:
        names: of the scripts.
        sums: [scripts, 2] samples, letters.
    """
    return _bars(names, {"samples, by the script of most letters": BLUE, "letters": ORANGE}, sums)


def _bars(labels: Sequence[str], colors: dict[str, str], values: np.ndarray) -> Any:
    """Horizontal bars: a row for each label, and a plot for each column of `values`, [labels, columns]."""
    figure, axes = _figure(len(colors), 0.9 + 0.28 * len(labels), sharey=True)
    for axis, (title, color), column in zip(axes, colors.items(), values.T, strict=True):
        bars = axis.barh(range(len(labels)), column, color=color, height=0.72)
        share = column / max(column.sum(), 1)
        bar_labels = [f"{compact(v)}  ({100 * s:.1f} %)" for v, s in zip(column.tolist(), share.tolist(), strict=True)]
        axis.bar_label(bars, bar_labels, padding=4, fontsize=9, color=_INK)
        axis.set(title=title, xlim=(0, max(column.max() * 1.6, 1)), xticks=[])
        axis.spines["bottom"].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return figure


def _shorten(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:16]}…{name[-17:]}"


@styled_figure
def draw_lengths(tokens: np.ndarray, tiles: np.ndarray, seq_length: int) -> Any:
    """Histograms of tokens [n] and tiles [n] per sample."""
    figure, (left, right) = _figure(2, 3.6)
    bins = np.geomspace(max(tokens.min(), 1), max(tokens.max(), 2) * 1.001, 56)
    groups = [tokens[tiles > 0], tokens[tiles == 0]]
    left.hist(groups, bins=bins, stacked=True, color=[BLUE, ORANGE], label=["with images", "text only"])
    left.set(xscale="log", title="Tokens per sample, image tokens included", xlabel="tokens", ylabel="samples")
    if tokens.max() > seq_length / 4:
        left.axvline(seq_length, color=_INK, linestyle="--", linewidth=1.2, label=f"seq_length {seq_length:,}")
    _plain_ticks(left.xaxis)
    highest = int(min(tiles.max(), _MAX_TILES))
    counts = np.bincount(np.minimum(tiles, highest), minlength=highest + 1)
    right.bar(np.arange(highest + 1), counts, color=GREEN, width=0.85)
    last = f" (last bar: {highest} or more)" if tiles.max() > highest else ""
    right.set(title="Tiles per sample, base views included", xlabel=f"tiles{last}", ylabel="samples")
    for axis in (left, right):
        _format_counts(axis)
    from matplotlib.ticker import MaxNLocator

    right.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    left.legend(frameon=False, fontsize=9)
    return figure


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
    for label in axis.get_ticklabels():
        label.set_rotation(45)


@styled_figure
def draw_images(sizes: np.ndarray) -> Any:
    """Histograms of image sizes, [images, 2] (width, height), and of aspect ratios."""
    from matplotlib.colors import LogNorm

    figure, (left, right) = _figure(2, 4.2)
    width, height = np.maximum(sizes, 1).T
    low, high = max(min(width.min(), height.min()) / 1.2, 1), max(width.max(), height.max()) * 1.2
    bins = np.geomspace(low, high, 48)
    counts, _, _ = np.histogram2d(width, height, bins=(bins, bins))
    mesh = left.pcolormesh(bins, bins, np.ma.masked_equal(counts.T, 0), cmap="viridis_r",
                           norm=LogNorm(1, max(counts.max(), 2)), rasterized=True)  # fmt: skip
    left.plot([low, high], [low, high], color="#999", linewidth=0.8, linestyle=":")
    ticks = [pixels for pixels in _TICK_PIXELS if low <= pixels <= high]
    left.set(xscale="log", yscale="log", title="Image sizes", xlabel="width, pixels", ylabel="height, pixels")
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_ticks([], minor=True)
    left.tick_params(axis="x", rotation=45)
    bar = figure.colorbar(mesh, ax=left, pad=0.02, format=lambda value, _: compact(value))
    bar.set_label("images")
    bar.ax.minorticks_off()
    ratio = np.clip(np.log2(width / height), -3.5, 3.5)
    right.hist(ratio, bins=np.linspace(-3.5, 3.5, 57), color=BLUE)
    right.set_xticks(np.log2(list(_RATIOS)), list(_RATIOS.values()))
    right.set(title="Aspect ratio", xlabel="width : height", ylabel="images")
    _format_counts(right)
    return figure


@styled_figure
def draw_grids(counts: dict[tuple[int, int], int]) -> Any:
    """Bars of image counts by grid (columns, rows) of tiles; (0, 0): the base view only."""
    figure, (axis,) = _figure(1, 3.0)
    grids, total = sorted(counts), max(sum(counts.values()), 1)
    names = ["base view only" if grid == (0, 0) else f"{grid[0]} × {grid[1]}" for grid in grids]
    bars = axis.bar(range(len(grids)), [counts[grid] for grid in grids], color=GREEN, width=0.7)
    bar_labels = [f"{compact(counts[grid])}\n{100 * counts[grid] / total:.1f} %" for grid in grids]
    axis.bar_label(bars, bar_labels, padding=2, fontsize=9, color=_INK)
    axis.set_xticks(range(len(grids)), names, rotation=45 if len(grids) > 16 else 0)
    axis.set(title="Tile grids of images", xlabel="columns × rows of tiles, without the base view",
             ylabel="images", ylim=(0, max(counts.values(), default=1) * 1.25))  # fmt: skip
    axis.set_xlim(-0.8, max(len(grids), 4) - 0.2)
    _format_counts(axis)
    return figure


@styled_figure
def draw_rows(efficiency: np.ndarray, tiles: np.ndarray, cost: np.ndarray, max_tiles: int) -> Any:
    """Histograms over the rows of an epoch: packing efficiency (0 to 1), tiles, cost (any unit), [rows] each."""
    figure, axes = _figure(3, 3.2)
    percent = 100 * efficiency
    axes[0].hist(percent, bins=np.linspace(min(np.floor(percent.min()), 99.0), 100, 41), color=BLUE)
    axes[0].set(title="Packing efficiency", xlabel="tokens, % of seq_length", ylabel="rows")
    axes[1].hist(tiles, bins=min(int(tiles.max() - tiles.min()) + 1, 40), color=GREEN)
    axes[1].axvline(max_tiles, color=_INK, linestyle="--", linewidth=1.2, label=f"limit {max_tiles}")
    axes[1].set(title="Tiles", xlabel="tiles per row")
    axes[1].legend(frameon=False, fontsize=9)
    axes[2].hist(cost / cost.mean(), bins=40, color=PURPLE)
    axes[2].set(title="Cost", xlabel="cost per row / mean")
    for axis in axes:
        _format_counts(axis)
    return figure


@styled_figure
def draw_cost_over_epoch(cost: np.ndarray) -> Any:
    """The cost of rows over the epoch, [rows]."""
    figure, (axis,) = _figure(1, 2.8)
    relative, rows = cost / cost.mean(), np.arange(len(cost))
    shown = rows[:: max(len(rows) // 4000, 1)]
    axis.plot(shown, relative[shown], ".", markersize=3, color=PURPLE, alpha=0.45, label="a row")
    width = max(len(rows) // 40, 1)
    if width > 1:
        mean = np.convolve(relative, np.ones(width) / width, mode="valid")
        axis.plot(rows[: len(mean)] + width / 2, mean, color=_INK, linewidth=1.6, label=f"mean of {width:,} rows")
    axis.set(title="Cost over the epoch", xlabel="row index", ylabel="cost / mean",
             ylim=(0, max(relative.max() * 1.15, 1.5)))  # fmt: skip
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="lower right")
    axis.grid(axis="y", color=_FAINT, linewidth=0.7)
    return figure
