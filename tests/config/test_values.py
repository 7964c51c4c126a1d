"""Values from YAML, JSON and the command line, as the types of the fields."""

from __future__ import annotations

import pytest

from megatron_vlm.config.values import to_type, without_none


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-5", float, 1e-5),
        (1, float, 1.0),
        ("1e6", int, 1_000_000),
        (2.0, int, 2),
        ("50_000", int, 50_000),
        ("True", bool, True),
        ("false", bool, False),
        (None, str | None, None),
        ("2e-6", float | None, 2e-6),
        (("a", "b"), list[str], ["a", "b"]),
        ([["28", 56]], list[list[int]], [[28, 56]]),
    ],
)
def test_accepted(value, kind, expected):
    converted = to_type(value, kind)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("abc", float, "expected a number, got 'abc'"),
        ("nan", float, "expected a number"),
        (True, float, "expected a number, got True"),
        (True, int, "expected a whole number, got True"),
        (1.5, int, "expected a whole number, got 1.5"),
        (2**0.5, int, "expected a whole number"),
        (1, bool, "expected true or false, got 1"),
        ("yes", bool, "expected true or false, got 'yes'"),
        (None, str, "expected text, got nothing"),
        (7, str, "put it in quotes"),
        ([], float, "expected a number, got []"),
        ("projector", list[str], "a list of one is [projector]"),
        ([1], list[str], "expected a list, each element text"),
        ([28, 28], list[list[int]], "expected a list, each element a list, each element a whole number"),
        ("x", float | None, "expected a number or nothing (null)"),
    ],
)
def test_refused_in_words(value, kind, words):
    with pytest.raises(ValueError) as caught:
        to_type(value, kind)
    assert words in str(caught.value)


def test_without_none():
    assert without_none(float | None) == (float, True)
    assert without_none(list[str]) == (list[str], False)
