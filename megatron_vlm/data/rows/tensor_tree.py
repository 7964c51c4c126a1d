"""Apply a function to every tensor, or every array, inside a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

_Tree = TypeVar("_Tree")


def map_leaves(value: _Tree, kind: type, function: Callable[[Any], Any]) -> _Tree:
    """A copy of `value` with `function` applied to all of its leaves of type `kind`.

    Dataclasses, lists and tuples are followed; everything else is kept as it is.
    """
    tree: Any = value
    if isinstance(tree, kind):
        return function(tree)  # type: ignore[no-any-return]
    if is_dataclass(tree) and not isinstance(tree, type):
        new = {item.name: map_leaves(getattr(tree, item.name), kind, function) for item in fields(tree)}
        return replace(tree, **new)  # type: ignore[return-value]
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(item, kind, function) for item in tree)  # type: ignore[return-value]
    return value
