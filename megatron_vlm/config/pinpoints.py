"""LLaVA's short notation for a range of tiling resolutions: `(1x1),...,(6x6)`, in tiles."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\s*\((\d+)x(\d+)\)\s*,\s*(?:\.\.\.|…)\s*,\s*\((\d+)x(\d+)\)\s*")


def expand_pinpoints(text: str, side: int) -> list[list[int]]:
    """All resolutions from A x B to C x D tiles, as [width, height] in pixels, by increasing width, then height.

    Args:
        text: `(AxB),...,(CxD)`, columns x rows of tiles.
        side: side of a tile, in pixels.

    Raises:
        ValueError: `text` is not a range, or the range is empty.
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
        raise ValueError(f"the range {text!r} is empty: (AxB),...,(CxD) means A to C columns and B to D rows")
    return sizes
