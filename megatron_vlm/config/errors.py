"""ConfigError, which lists all problems of the settings, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(Exception):
    """Invalid settings. The message is a numbered list of `problems`."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            heading = "1 problem in the settings:"
        else:
            heading = f"{len(self.problems)} problems in the settings:"
        numbered = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        super().__init__("\n".join([heading, *numbered]))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None if none is similar."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return matches[0] if matches else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The dotted key whose last component is most similar to that of `key`; ties are decided by the section."""
    by_name: dict[str, list[str]] = {}
    for candidate in keys:
        by_name.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    name = nearest(key.rpartition(".")[2], by_name)
    return None if name is None else difflib.get_close_matches(key, by_name[name], n=1, cutoff=0.0)[0]
