"""Mixture files: the sources of a mixture and how many samples an epoch takes from each.

A mixture is a YAML file:

    datasets:
      - json_path: captions.json          # or shard_path: a folder of shards, or s3://…; or path: of any source
      - json_path: charts.json
        sampling_strategy: random:10%     # all | first:N | end:N | random:N | choose:N | repeat:K; N may be P%
      - shard_path: shards/tables
        choose: 2000                      # the same as sampling_strategy: choose:2000
      - shard_path: shards/science
        repeat: 2                         # the same as sampling_strategy: repeat:2

`first` and `end` count all annotations in file order. `random` and `choose` sample from the usable ones. `random`
samples once, without replacement, and every epoch takes the same samples. `choose` samples again for each epoch; if N
exceeds the usable samples, all are repeated first. `repeat: 1.5` takes every sample once, and a random half of them
again, which changes with each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.s3 import is_remote, join

_KINDS = ("all", "first", "end", "random", "choose", "repeat")
_PATHS = ("json_path", "shard_path", "path")
"""All mean the same: what is there decides how it is read. The first two are those of published mixtures."""
_KEYS = {*_PATHS, "sampling_strategy", "choose", "repeat"}


@dataclass(frozen=True)
class SamplingRule:
    """Selects the samples that an epoch takes from a source."""

    kind: str = "all"
    amount: Fraction = Fraction(1)
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> SamplingRule:
        """
        Args:
            text: `all`, or a kind and an amount, for example `first:100`, `random:5%`, `repeat:1.5`.

        Raises:
            ValueError: `text` is not a sampling rule.
        """
        kind, _, amount = str(text).strip().partition(":")
        if kind == "all" and not amount:
            return cls()
        percent = amount.endswith("%")
        try:
            value = Fraction(amount.rstrip("%").strip())
        except (ValueError, ZeroDivisionError):
            value = Fraction(-1)
        whole = percent or kind == "repeat" or value.denominator == 1
        if kind not in _KINDS[1:] or value <= 0 or not whole or (percent and kind == "repeat"):
            raise ValueError(
                f"{text!r}: expected all, first:N, end:N, random:N, choose:N (N a number or P%) or repeat:K"
            )
        return cls(kind, value, percent)

    def __str__(self) -> str:
        if self.kind == "all":
            return "all"
        return f"{self.kind}:{float(self.amount):.15g}{'%' if self.percent else ''}"

    @property
    def fixed(self) -> bool:
        """Whether every epoch takes the same samples."""
        return self.kind not in ("choose", "repeat")

    def select(self, usable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Indices into the source. An index occurs once for each time that the epoch takes the sample.

        Args:
            usable: [n] bool, False for rejected samples.
            rng: of this epoch. A fixed rule needs the same state in every epoch.
        """
        candidates = np.flatnonzero(usable)
        count = ceil(self.amount * len(usable) / 100) if self.percent else int(self.amount)
        if self.kind == "first":
            return candidates[candidates < count]
        if self.kind == "end":
            return candidates[candidates >= len(usable) - count]
        if self.kind == "random":
            return rng.permutation(candidates)[:count]
        if self.kind == "choose":
            copies, rest = divmod(count, max(len(candidates), 1))
        else:  # all, repeat
            copies = floor(self.amount)
            rest = round((self.amount - copies) * len(candidates))
        return np.concatenate([np.tile(candidates, copies), rng.permutation(candidates)[:rest]])


def read_mixture(path: Path, data_root: str | None = None) -> list[tuple[str, SamplingRule]]:
    """The entries of a mixture file as (path of the source, rule).

    Args:
        path: of the file.
        data_root: folder or s3:// prefix, root of its relative paths; default: the working directory.

    Raises:
        DataError: the file cannot be read, or entries are invalid. The message lists all of them.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"mixture {path} cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"mixture {path} is not YAML: {error}. Fix the file.") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise DataError(f"mixture {path} needs a list under `datasets:`. Write one entry for each data set.")
    problems, entries = [], []
    for number, entry in enumerate(datasets):
        try:
            name, rule = _read_entry(entry)
            entries.append((_resolve(data_root, name), rule))
        except ValueError as error:
            problems.append(f"  datasets[{number}]: {error}")
    if problems:
        raise DataError(f"mixture {path}:\n" + "\n".join(problems))
    return entries


def _read_entry(entry: Any) -> tuple[str, SamplingRule]:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a mapping; expected json_path, shard_path or path with a sampling rule")
    if unknown := sorted(set(map(str, entry)) - _KEYS):
        raise ValueError(f"unknown keys {unknown}; known keys are {sorted(_KEYS)}")
    paths = [entry[key] for key in _PATHS if entry.get(key)]
    if len(paths) == 1 and not isinstance(paths[0], str):
        raise ValueError(f"{paths[0]!r} is not a path; expected a text")
    if len(paths) != 1:
        raise ValueError("give exactly one of json_path, shard_path and path")
    rules = [str(entry["sampling_strategy"])] if "sampling_strategy" in entry else []
    rules += [f"{key}:{entry[key]}" for key in ("choose", "repeat") if key in entry]
    if len(rules) > 1:
        raise ValueError(f"give one of sampling_strategy, choose and repeat, not {len(rules)}")
    return str(paths[0]), SamplingRule.parse(rules[0]) if rules else SamplingRule()


def _resolve(root: str | None, path: str) -> str:
    if root is None or "://" in path or Path(path).is_absolute():
        return path
    return join(root, path) if is_remote(root) else str(Path(root, path))
