"""The one error of the settings: everything that is wrong, in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(Exception):
    """Wrong settings. The message numbers every problem; `problems` holds them one by one."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            heading = "1 problem in the settings:"
        else:
            heading = f"{len(self.problems)} problems in the settings:"
        numbered = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        super().__init__("\n".join([heading, *numbered]))


def nearest(name: str, right_names: Iterable[str]) -> str | None:
    """The right name most like `name`, or None where none is alike."""
    matches = difflib.get_close_matches(name, list(right_names), n=1, cutoff=0.55)
    return matches[0] if matches else None


def nearest_key(key: str, right_keys: Iterable[str]) -> str | None:
    """The dotted key whose last name is most like that of `key`; of several, the one whose section is."""
    by_name: dict[str, list[str]] = {}
    for right in right_keys:
        by_name.setdefault(right.rpartition(".")[2], []).append(right)
    name = nearest(key.rpartition(".")[2], by_name)
    return None if name is None else difflib.get_close_matches(key, by_name[name], n=1, cutoff=0.0)[0]
