"""The plots of a data report: of many sets and of hardly any data; numbers as people read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.report.plots import (
    compact,
    draw_course,
    draw_grids,
    draw_images,
    draw_lengths,
    draw_rows,
    draw_sets,
)


@pytest.mark.parametrize(
    ("number", "told"),
    [(0, "0"), (950, "950"), (9999, "9,999"), (12_345, "12.3K"), (999_999, "1M"), (4_560_000, "4.56M"),
     (1.2e9, "1.2B")],
)  # fmt: skip
def test_counts(number: float, told: str) -> None:
    assert compact(number) == told


def size_of(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 3
    return image.size


def test_many_sets() -> None:
    sums = np.random.default_rng(0).integers(0, 10**9, (133, 3))
    few = size_of(draw_sets(["one"], sums[:1]))
    many = size_of(draw_sets([f"{'a long name ' * 9}{n}" for n in range(133)], sums))
    assert many[0] == few[0] and 8 * few[1] < many[1] < 20 * few[1]  # forty bars and one for the others


@pytest.mark.parametrize("count", [1, 500])
def test_any_amount(count: int) -> None:
    rng = np.random.default_rng(0)
    tokens, tiles = rng.integers(1, 60_000, count), rng.integers(0, 90, count)
    for png in (
        draw_lengths(tokens, tiles, 32_768),
        draw_images(rng.integers(1, 20_000, (count, 2))),
        draw_grids({(0, 0): count}),
        draw_grids({(columns, rows): count for columns in range(1, 7) for rows in range(1, 7)}),
        draw_rows(rng.random(count), tiles, 1.0 + rng.random(count), 64),
        draw_course(1.0 + rng.random(count)),
    ):
        size_of(png)


def test_all_alike() -> None:
    alike = np.full(9, 7)
    size_of(draw_lengths(alike, alike * 0, 32_768))
    size_of(draw_images(np.full((9, 2), 64)))
    size_of(draw_rows(np.ones(9), alike, np.ones(9), 64))
