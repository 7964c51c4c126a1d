"""What an epoch consists of: which samples of which source, drawn anew for every epoch.

A mixture is a YAML file:

    datasets:
      - json_path: captions.json          # or shard_path: a folder of shards
      - json_path: charts.json
        sampling_strategy: random:10%     # all | first:N | end:N | random:N | choose:N | repeat:K; N or P%
      - shard_path: shards/tables
        choose: 2000                      # the same as sampling_strategy: choose:2000
      - shard_path: shards/science
        repeat: 2                         # the same as sampling_strategy: repeat:2

`first` and `end` count annotations as written; `random` and `choose` draw from the usable ones, `random` at most all of
them and `choose` more than once each if more are asked for; `repeat: 1.5` takes all once and a drawn half once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.order import spread
from megatron_vlm.data.sources import SampleSource, SourceList, open_source

_KINDS = ("all", "first", "end", "random", "choose", "repeat")
_KEYS = {"json_path", "shard_path", "sampling_strategy", "choose", "repeat"}


@dataclass(frozen=True)
class SamplingRule:
    """How many of a source's samples an epoch takes, and which."""

    kind: str = "all"
    amount: Fraction = Fraction(1)
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> SamplingRule:
        """
        Args:
            text: `all`, or a kind and an amount as in `first:100`, `random:5%`, `repeat:1.5`.

        Raises:
            ValueError: it is neither.
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

    def draw(self, usable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Indices into one source, some perhaps more than once.

        Args:
            usable: [n] bool, False for samples that are refused.
            rng: this epoch's.
        """
        everything = np.flatnonzero(usable)
        count = ceil(self.amount * len(usable) / 100) if self.percent else int(self.amount)
        if self.kind == "first":
            return everything[everything < count]
        if self.kind == "end":
            return everything[everything >= len(usable) - count]
        if self.kind == "random":
            return rng.permutation(everything)[:count]
        if self.kind == "choose":
            copies, rest = divmod(count, max(len(everything), 1))
        else:  # all, repeat
            copies = floor(self.amount)
            rest = round((self.amount - copies) * len(everything))
        return np.concatenate([np.tile(everything, copies), rng.permutation(everything)[:rest]])


@dataclass
class Mixture:
    """Sources and, for each use of one, the rule it is drawn by. A source may be used more than once."""

    sources: SourceList
    uses: list[tuple[int, SamplingRule]]
    """(number of the source, rule)"""

    def draw(self, usable: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Global sample numbers of one epoch in the order they come; the same for the same seed and epoch.

        Every use is spread over the whole epoch (see `order.spread`), so the mix is the same from beginning to end.

        Args:
            usable: [samples] bool over all sources.
            seed: of the data order.
            epoch: from 0.
        """
        numbers, times = [], []
        for place, (source, rule) in enumerate(self.uses):
            start, stop = self.sources.starts[source], self.sources.starts[source + 1]
            rng = np.random.default_rng([seed, epoch, place])
            drawn = rule.draw(usable[start:stop], rng)
            numbers.append(start + drawn)
            times.append(spread(drawn, self.sources.sources[source].shard_starts, rng))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(numbers).astype(np.int64)[order]


def open_mixture(data_path: Sequence[str], image_folder: str | None) -> Mixture:
    """Open everything `data_path` names.

    Args:
        data_path: annotation files, shard folders and mixture files (.yaml, .yml).
        image_folder: what image paths of annotations start from.

    Raises:
        DataError: nothing is named, or something cannot be opened.
    """
    wanted: list[tuple[str, SamplingRule]] = []
    for path in data_path:
        if Path(path).suffix in (".yaml", ".yml"):
            wanted += _read_mixture(Path(path))
        else:
            wanted.append((path, SamplingRule()))
    if not wanted:
        raise DataError("no data: data_path names no annotation file, shard folder or mixture")
    opened: dict[str, int] = {}
    sources: list[SampleSource] = []
    uses = []
    for path, rule in wanted:
        if path not in opened:
            opened[path] = len(sources)
            sources.append(open_source(path, image_folder))
        uses.append((opened[path], rule))
    return Mixture(SourceList(sources), uses)


def _read_mixture(path: Path) -> list[tuple[str, SamplingRule]]:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"mixture {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DataError(f"mixture {path} is not YAML: {error}") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise DataError(f"mixture {path} needs a list under `datasets:`")
    problems, wanted = [], []
    for number, entry in enumerate(datasets):
        try:
            wanted.append(_read_entry(entry))
        except ValueError as error:
            problems.append(f"  datasets[{number}]: {error}")
    if problems:
        raise DataError(f"mixture {path}:\n" + "\n".join(problems))
    return wanted


def _read_entry(entry: Any) -> tuple[str, SamplingRule]:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no mapping; expected json_path or shard_path with a sampling rule")
    if unknown := sorted(set(map(str, entry)) - _KEYS):
        raise ValueError(f"unknown keys {unknown}; known are {sorted(_KEYS)}")
    paths = [entry[key] for key in ("json_path", "shard_path") if entry.get(key)]
    if len(paths) != 1:
        raise ValueError("give exactly one of json_path and shard_path")
    rules = [str(entry["sampling_strategy"])] if "sampling_strategy" in entry else []
    rules += [f"{key}:{entry[key]}" for key in ("choose", "repeat") if key in entry]
    if len(rules) > 1:
        raise ValueError(f"give one of sampling_strategy, choose and repeat, not {len(rules)}")
    return str(paths[0]), SamplingRule.parse(rules[0]) if rules else SamplingRule()
