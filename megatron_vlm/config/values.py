"""Values as they come from YAML, JSON or the command line, made into the types of the dataclass fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
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
        raise ValueError(f"{text!r} is no size: expected a number and a unit, as in 100gb or 64MiB")
    return count


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The resolved type of each field of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def without_none(kind: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True); every other type as (type, False)."""
    if isinstance(kind, types.UnionType):
        (inner,) = (member for member in typing.get_args(kind) if member is not types.NoneType)
        return inner, True
    return kind, False


def type_name(kind: Any) -> str:
    """A type in words, as error messages name it."""
    inner, optional = without_none(kind)
    if typing.get_origin(inner) is list:
        (element,) = typing.get_args(inner)
        name = "a list, each element " + type_name(element)
    else:
        name = _TYPE_NAMES[inner]
    return name + " or nothing (null)" if optional else name


def to_type(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or a ValueError that says in words what was expected.

    Numbers may come as text, because YAML 1.1 reads 1e-5 (no dot) as text and a command line has nothing else.
    """
    inner, optional = without_none(kind)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is list:
        if not isinstance(value, list | tuple):
            raise _wrong(value, kind)
        (element,) = typing.get_args(inner)
        try:
            return [to_type(item, element) for item in value]
        except ValueError:
            raise _wrong(value, kind) from None
    converters = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
    converted = converters[inner](value)
    if converted is None:
        raise _wrong(value, kind)
    return converted


def _wrong(value: Any, kind: Any) -> ValueError:
    got = "nothing (null)" if value is None else repr(value)
    advice = ""
    if without_none(kind)[0] is str and isinstance(value, bool | int | float):
        advice = "; put it in quotes if it is meant as text"
    elif typing.get_origin(without_none(kind)[0]) is list and isinstance(value, str | int):
        advice = f"; a list of one is [{value}]"
    return ValueError(f"expected {type_name(kind)}, got {got}{advice}")


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
