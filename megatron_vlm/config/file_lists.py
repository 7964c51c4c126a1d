"""Paths that stand for several files: `train_{a,b}.json`, `part-{000..127}.tar`, `train-*.parquet`."""

from __future__ import annotations

import re
from glob import glob
from itertools import product
from pathlib import Path

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_PATHS = 100_000


def expand_path(path: str) -> list[str]:
    """The paths that a local path stands for: lists in braces in order, then names that match `*`, sorted.

    Raises:
        ValueError: no name matches, or a list is wrong (see `expand_braces`).
    """
    paths: list[str] = []
    for name in expand_braces(path):
        if "*" not in name or Path(name).exists():
            paths.append(name)
            continue
        matching = sorted(glob(name))
        if not matching:
            raise ValueError(f"no file matches {name}")
        paths += matching
    return paths


def expand_braces(path: str) -> list[str]:
    """The paths that a path stands for, in order; itself if it has no list in braces or is the name of a file.

    Numbers keep the leading zeros of the first: `{08..10}` is 08, 09, 10.

    Raises:
        ValueError: a range is empty, or there are too many paths.
    """
    parts = _GROUP.split(path)  # text, group, text, group, ..., text
    if len(parts) == 1 or ("://" not in path and Path(path).exists()):
        return [path]
    choices = [[part] if not number % 2 else _choices(part, path) for number, part in enumerate(parts)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > _MAX_PATHS:
        raise ValueError(f"{path} stands for {total} files, more than {_MAX_PATHS}")
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(group: str, path: str) -> list[str]:
    if bounds := _RANGE.fullmatch(group):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise ValueError(f"the range {{{group}}} of {path} is empty")
        if int(last) - int(first) >= _MAX_PATHS:
            raise ValueError(f"{path} stands for more than {_MAX_PATHS} files")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name.strip() for name in group.split(",")] if "," in group else [f"{{{group}}}"]
