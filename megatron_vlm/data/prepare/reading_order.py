"""The text of OCR words in reading order."""

from __future__ import annotations

import math
from typing import Any

from megatron_vlm.data.prepare.tables import RowError
from megatron_vlm.data.sources.message_formats import shown

Word = tuple[str, float, float, float, float]
"""(text, left, top, right, bottom)"""


def parse_box(word: dict[str, Any]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of `word["box"]`, which holds these four or the corners of a polygon [[x, y], ...].

    Raises:
        RowError: the box has another form.
    """
    box = word.get("box")
    try:
        if isinstance(box, list) and isinstance(box[0], list):
            xs, ys = zip(*box, strict=True)
            box = [min(xs), min(ys), max(xs), max(ys)]
        left, top, right, bottom = map(float, box or ())
    except (TypeError, ValueError, IndexError, OverflowError):
        raise RowError("bad box", f"{shown(box)} of the word {word.get('text')!r}") from None
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise RowError("bad box", f"{shown(box)} of the word {word.get('text')!r}")
    return left, top, right, bottom


def reading_order(words: list[Word]) -> str:
    """The text of `words`: lines from top to bottom, each from left to right.

    A word belongs to a line if its vertical centre is within half a line height of the line's first word.
    """
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda word: (word[2] + word[4], word[1])):
        if lines:
            _, _, top, _, bottom = lines[-1][0]
            if abs((word[2] + word[4]) / 2 - (top + bottom) / 2) <= (bottom - top) / 2:
                lines[-1].append(word)
                continue
        lines.append([word])
    return "\n".join(" ".join(word[0] for word in sorted(line, key=lambda word: word[1])) for line in lines)
