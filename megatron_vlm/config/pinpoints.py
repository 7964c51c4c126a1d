"""LLaVA's short way to write many tiling resolutions: `(1x1),...,(6x6)`, in tiles."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\s*\((\d+)x(\d+)\)\s*,\s*(?:\.\.\.|…)\s*,\s*\((\d+)x(\d+)\)\s*")


def expand_pinpoints(text: str, side: int) -> list[list[int]]:
    """All resolutions from (A x B) to (C x D) tiles, as (width, height) in pixels, the narrow ones first.

    Args:
        text: `(AxB),...,(CxD)`: columns x rows of tiles.
        side: of a tile, pixels.

    Raises:
        ValueError: it is not of this form, or nothing lies in the range.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a list of [width, height] or a range such as (1x1),...,(6x6), got {text!r}")
    first_column, first_row, last_column, last_row = map(int, match.groups())
    sizes = [
        [column * side, row * side]
        for column in range(first_column, last_column + 1)
        for row in range(first_row, last_row + 1)
    ]
    if not sizes or sizes[0][0] < 1 or sizes[0][1] < 1:
        raise ValueError(f"nothing lies in the range {text!r}: (AxB),...,(CxD) goes from A to C columns, B to D rows")
    return sizes
