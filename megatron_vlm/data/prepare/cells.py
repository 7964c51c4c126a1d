"""Cells of a table as text, answers and lists. What cannot be meant is an error, never a text such as `nan`.

Tables that were saved by pandas hold lists as the text of a Python list, and missing cells as NaN.
"""

from __future__ import annotations

import ast
import datetime
import io
import json
import math
import tokenize
from collections import Counter
from decimal import Decimal
from typing import Any

from megatron_vlm.data.prepare.tables import RowError
from megatron_vlm.data.sources.message_formats import shown

_ANSWER_KEYS = ("answer", "text", "value", "content")
"""Keys of an annotator's answer: `answer` in VQAv2, `text` in SQuAD."""
_PRINTABLE = (str, int, float, Decimal, datetime.date, datetime.time)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, blank, or NaN."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell(row: dict[str, Any], column: str) -> Any:
    """The value of a column.

    Raises:
        RowError: the column is missing or empty.
    """
    value = row.get(column)
    if is_missing(value):
        wrong = "is absent" if column not in row else f"is empty ({value!r})"
        raise RowError("missing column", f"{column!r} {wrong}; the columns are {sorted(map(str, row))}")
    return value


def text_cell(row: dict[str, Any], column: str) -> str:
    """The text of a column.

    Raises:
        RowError: it is missing, or neither a text nor a number.
    """
    return _text(cell(row, column), column)


def answer_cell(row: dict[str, Any], column: str) -> str:
    """The answer in a column: of several annotators' answers the most frequent, and of those the first.

    Raises:
        RowError: it is missing, or holds no text.
    """
    return _answer(cell(row, column), column)


def list_cell(row: dict[str, Any], column: str) -> list[Any]:
    """The list in a column, which may be written as JSON or as a Python list.

    Raises:
        RowError: it is missing or no list.
    """
    value = cell(row, column)
    found = parse_list(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise RowError("no list", f"{column!r} is {shown(value)}, expected a list")
    return found


def parse_list(text: str) -> list[Any] | None:
    """The list that a text is, as JSON or in Python's notation, or None."""
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if _has_adjacent_strings(text.strip()):
            return None
    return value if isinstance(value, list) else None


def _has_adjacent_strings(text: str) -> bool:
    """numpy prints `['a' 'b']`, which Python would read as one string."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    return any(kind == following == tokenize.STRING for kind, following in zip(kinds, kinds[1:], strict=False))


def _text(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, _PRINTABLE) or value in (math.inf, -math.inf):
        raise RowError("no text", f"{column!r} is {shown(value)}, expected a text")
    return str(value).strip()


def _answer(value: Any, column: str) -> str:
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # VQAv2's answers in a CSV file
        value = parse_list(value) or value
    if isinstance(value, dict):
        key = next((key for key in _ANSWER_KEYS if not is_missing(value.get(key))), None)
        if key is None:
            raise RowError("no text", f"{column!r} is {shown(value)}, an object without {' or '.join(_ANSWER_KEYS)}")
        return _answer(value[key], column)
    if isinstance(value, list):
        answers = [_answer(item, column) for item in value if not is_missing(item)]
        if not answers:
            raise RowError("missing column", f"{column!r} is {shown(value)}, without any answer")
        return Counter(answers).most_common(1)[0][0]
    return _text(value, column)
