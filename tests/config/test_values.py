"""Conversion of values from YAML, JSON and the command line to the types of the fields."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest

from megatron_vlm.config.values import choices_of, to_type, without_none


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-5", float, 1e-5),
        (1, float, 1.0),
        ("1e6", int, 1_000_000),
        (2.0, int, 2),
        ("50_000", int, 50_000),
        ("True", bool, True),
        ("false", bool, False),
        (None, str | None, None),
        ("b", Literal["a", "b"], "b"),
        (None, Literal["a", "b"] | None, None),
        (("b", "a"), list[Literal["a", "b"]], ["b", "a"]),
        ("x_12", Annotated[str, "x_N"], "x_12"),
        ("2e-6", float | None, 2e-6),
        (("a", "b"), list[str], ["a", "b"]),
        ([["28", 56]], list[list[int]], [[28, 56]]),
    ],
)
def test_accepted(value, hint, expected):
    converted = to_type(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("abc", float, "expected a number, got 'abc'"),
        ("nan", float, "expected a number"),
        (True, float, "expected a number, got True"),
        (True, int, "expected an integer, got True"),
        (1.5, int, "expected an integer, got 1.5"),
        (2**0.5, int, "expected an integer"),
        (1, bool, "expected true or false, got 1"),
        ("yes", bool, "expected true or false, got 'yes'"),
        (None, str, "expected text, got nothing"),
        (7, str, "put it in quotes"),
        ([], float, "expected a number, got []"),
        ("projector", list[str], "a list of one is [projector]"),
        ([1], list[str], "expected a list, each element text"),
        ([28, 28], list[list[int]], "expected a list, each element a list, each element an integer"),
        ("x", float | None, "expected a number or nothing (null)"),
        ("B", Literal["a", "b"], "expected one of a, b, got 'B'"),
        (1, Literal["a", "b"], "expected one of a, b, got 1"),
        (None, Literal["a", "b"], "expected one of a, b, got nothing (null)"),
        ("c", Literal["a", "b"] | None, "expected one of a, b or nothing (null), got 'c'"),
        ("a", list[Literal["a", "b"]], "a list of one is [a]"),
        (["a", "c"], list[Literal["a", "b"]], "expected a list, each element one of a, b, got ['a', 'c']"),
        ("x_N", Annotated[str, "x_N"], "expected one of x_N, got 'x_N'"),
        ("x_01", Annotated[str, "x_N"], "expected one of x_N, got 'x_01'"),
    ],
)
def test_rejected_with_a_message(value, hint, message):
    with pytest.raises(ValueError) as caught:
        to_type(value, hint)
    assert message in str(caught.value)


def test_choices_of():
    assert choices_of(Literal["a", "b"]) == choices_of(Literal["a", "b"] | None) == ("a", "b")
    assert choices_of(list[Literal["a", "b"]]) == ("a", "b")
    assert choices_of(str) == choices_of(float | None) == choices_of(list[str]) == ()


def test_without_none():
    assert without_none(Literal["a"] | None) == (Literal["a"], True)
    assert without_none(float | None) == (float, True)
    assert without_none(list[str]) == (list[str], False)
