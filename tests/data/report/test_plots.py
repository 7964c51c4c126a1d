"""The plots of the data report, with many datasets and with very little data."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.report.inspection import Span
from megatron_vlm.data.report.plots import (
    BLUE,
    GREEN,
    compact,
    draw_cost_over_epoch,
    draw_datasets,
    draw_grids,
    draw_images,
    draw_lengths,
    draw_rows,
)
from megatron_vlm.data.report.row_picture import RowPicture, draw_packed_rows


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (9999, "9,999"), (12_345, "12.3K"), (999_999, "1M"), (4_560_000, "4.56M"),
     (1.2e9, "1.2B")],
)  # fmt: skip
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


def size_of(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 3
    return image.size


def test_many_datasets() -> None:
    sums = np.random.default_rng(0).integers(0, 10**9, (133, 3))
    few = size_of(draw_datasets(["one"], sums[:1]))
    many = size_of(draw_datasets([f"{'a long name ' * 9}{n}" for n in range(133)], sums))
    assert many[0] == few[0] and 8 * few[1] < many[1] < 20 * few[1]  # 40 bars and one for the others


@pytest.mark.parametrize("count", [1, 500])
def test_one_and_many_values(count: int) -> None:
    rng = np.random.default_rng(0)
    tokens, tiles = rng.integers(1, 60_000, count), rng.integers(0, 90, count)
    for png in (
        draw_lengths(tokens, tiles, 32_768),
        draw_images(rng.integers(1, 20_000, (count, 2))),
        draw_grids({(0, 0): count}),
        draw_grids({(columns, rows): count for columns in range(1, 7) for rows in range(1, 7)}),
        draw_rows(rng.random(count), tiles, 1.0 + rng.random(count), 64),
        draw_cost_over_epoch(1.0 + rng.random(count)),
    ):
        size_of(png)


def test_packed_rows_show_each_kind_of_token() -> None:
    spans = [Span("image", 0, 60, ""), Span("prompt", 60, 80, ""), Span("answer", 80, 100, "")]
    labels = np.array([-100] * 80 + [1] * 20)
    sample: Any = SimpleNamespace(
        spans=spans, images=["one"], encoded=SimpleNamespace(ids=np.arange(100), labels=labels)
    )
    row = RowPicture(7, 1.25, [sample, sample])
    assert row.title == "Row 7: 2 documents, 2 images, 200 tokens, 40 supervised; cost 1.25 × the mean"
    pixels = np.asarray(Image.open(io.BytesIO(draw_packed_rows([row], 400))).convert("RGB"))
    counts = {
        name: int((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum())
        for name, color in {"image": BLUE, "answer": GREEN}.items()
    }
    assert 2.5 < counts["image"] / counts["answer"] < 3.3  # as many as their tokens


def test_equal_values() -> None:
    equal = np.full(9, 7)
    size_of(draw_lengths(equal, equal * 0, 32_768))
    size_of(draw_images(np.full((9, 2), 64)))
    size_of(draw_rows(np.ones(9), equal, np.ones(9), 64))
