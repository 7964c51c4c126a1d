"""Conversion of values from YAML, JSON or the command line to the types of the dataclass fields."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Annotated, Any, Literal

from megatron_vlm.config.errors import nearest

_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
}


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


def to_bytes(text: str) -> int:
    """Bytes of a size such as 100gb (10^9) or 64MiB (2^20), or a ValueError."""
    size = text.strip().lower()
    unit = size.lstrip("0123456789.")
    try:
        count = int(float(size[: len(size) - len(unit)]) * _UNITS[unit.strip()])
    except (KeyError, ValueError):
        count = 0
    if count <= 0:
        raise ValueError(f"{text!r} is not a size: expected a number and a unit, such as 100gb or 64MiB")
    return count


_FIELD_TYPES: dict[type[Any], dict[str, Any]] = {}
"""Resolving hints takes most of the time of checking a recipe, and the planner checks hundreds."""


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The resolved type hint of each field of a dataclass, by name. All callers get the same dict."""
    if cls not in _FIELD_TYPES:
        hints = typing.get_type_hints(cls, include_extras=True)
        _FIELD_TYPES[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _FIELD_TYPES[cls]


def without_none(hint: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True); every other type as (type, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = (member for member in typing.get_args(hint) if member is not types.NoneType)
        return inner, True
    return hint, False


def choices_of(hint: Any) -> tuple[str, ...]:
    """The allowed texts of a Literal, or of a list of it; () for a type without choices.

    `Annotated[str, "a", "b_N"]` stands for what Literal cannot express: "b_N" allows b_1, b_2, ...
    """
    inner, _ = without_none(hint)
    if typing.get_origin(inner) is list:
        return choices_of(typing.get_args(inner)[0])
    if typing.get_origin(inner) is Literal:
        return typing.get_args(inner)
    return inner.__metadata__ if typing.get_origin(inner) is Annotated else ()


def type_name(hint: Any) -> str:
    """A type as error messages name it."""
    inner, optional = without_none(hint)
    if typing.get_origin(inner) is list:
        (element,) = typing.get_args(inner)
        name = "a list, each element " + type_name(element)
    elif choices := choices_of(inner):
        name = "one of " + ", ".join(choices)
    else:
        name = _TYPE_NAMES[inner]
    return name + " or nothing (null)" if optional else name


def to_type(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises a ValueError that says what was expected.

    Numbers may come as text: YAML 1.1 reads 1e-5 (no dot) as text, and the command line gives only text.
    """
    inner, optional = without_none(hint)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is list:
        if not isinstance(value, list | tuple):
            raise _wrong(value, hint)
        (element,) = typing.get_args(inner)
        try:
            return [to_type(item, element) for item in value]
        except ValueError:
            raise _wrong(value, hint) from None
    if choices := choices_of(inner):
        converted = value if _is_choice(value, choices) else None
    else:
        converters = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
        converted = converters[inner](value)
    if converted is None:
        raise _wrong(value, hint)
    return converted


def _is_choice(value: Any, choices: tuple[str, ...]) -> bool:
    if not isinstance(value, str):
        return False
    numbered = re.sub(r"_[1-9]\d*$", "_N", value)
    return numbered in choices if numbered != value else value in choices and not value.endswith("_N")


def _wrong(value: Any, hint: Any) -> ValueError:
    got = "nothing (null)" if value is None else repr(value)
    inner, _ = without_none(hint)
    choices, advice = choices_of(hint), ""
    if inner is str and isinstance(value, bool | int | float):
        advice = "; put it in quotes if it is meant as text"
    elif typing.get_origin(inner) is list and isinstance(value, str | int):
        advice = f"; a list of one is [{value}]"
    elif choices:
        given = value if isinstance(value, list | tuple) else [value]
        guesses = [nearest(str(item), choices) for item in given if not _is_choice(item, choices)]
        advice = f"; the nearest is {guesses[0]}" if guesses and guesses[0] else ""
    return ValueError(f"expected {type_name(hint)}, got {got}{advice}")


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # 1e6 and the like
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _to_str(value: Any) -> str | None:
    return value if isinstance(value, str) else None
