"""A picture of packed rows in the data report: documents, images, supervised tokens, and what each row costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.report.inspection import SampleView
from megatron_vlm.data.report.plots import BLUE, GREEN, compact, styled_figure

_COLORS = {"prompt": "#c9ced4", "answer": GREEN, "image": BLUE}
_LABELS = {"image": "image tokens", "prompt": "text without loss", "answer": "supervised"}
_ROW_HEIGHT = 0.9
"""Inches."""


@dataclass(frozen=True)
class RowPicture:
    """One row of an epoch."""

    index: int
    cost: float
    """In multiples of the mean cost."""
    samples: Sequence[SampleView]
    """In the order in which they are packed."""

    @property
    def title(self) -> str:
        """What the row holds, in words."""
        images = sum(len(view.images) for view in self.samples)
        supervised = sum(int((view.encoded.labels != -100).sum()) for view in self.samples)
        tokens = sum(len(view.encoded.ids) for view in self.samples)
        return (
            f"Row {self.index}: {len(self.samples)} documents, {images} images, {compact(tokens)} tokens, "
            f"{compact(supervised)} supervised; cost {self.cost:.2f} × the mean"
        )


@styled_figure
def draw_packed_rows(rows: Sequence[RowPicture], seq_length: int) -> Any:
    """A bar per row, as long as its tokens, with a line between documents.

    Args:
        rows: to draw.
        seq_length: tokens that a row may have; the rest of a bar is padding.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11.0, 0.8 + _ROW_HEIGHT * len(rows)), layout=ConstrainedLayoutEngine(hspace=0.02))
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0].tolist()
    for axis, row in zip(axes, rows, strict=True):
        start = 0
        for view in row.samples:
            for kind, color in _COLORS.items():
                parts = [(start + span.start, span.stop - span.start) for span in view.spans if span.kind == kind]
                axis.broken_barh(parts, (0, 1), facecolors=color, linewidth=0)
            start += len(view.encoded.ids)
            axis.axvline(start, color="white", linewidth=0.8)
        axis.set(xlim=(0, seq_length), ylim=(0, 1), yticks=[], title=row.title)
        axis.spines["left"].set_visible(False)
    axes[-1].set_xlabel("position in the row, tokens")
    keys = [Patch(color=_COLORS[kind], label=label) for kind, label in _LABELS.items()]
    figure.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False, fontsize=9)
    return figure
