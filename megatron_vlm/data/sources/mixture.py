"""What an epoch consists of: which samples of which source, drawn anew for every epoch, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.config.values import to_bytes
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.sources.mixture_file import SamplingRule, read_mixture
from megatron_vlm.data.sources.sample_source import SampleSource, SourceList, open_source
from megatron_vlm.data.sources.shard_shuffle import spread

_OPENED_AT_ONCE = 8


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
        numbers, times = self.draw_uses(usable, seed, epoch), []
        for place, (source, _) in enumerate(self.uses):
            rng = np.random.default_rng([seed, epoch, place, 1])
            drawn = numbers[place] - self.sources.starts[source]
            times.append(spread(drawn, self.sources.sources[source].shard_starts, rng))
        order = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(numbers)[order]

    def draw_uses(self, usable: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
        """For each use of a source the global sample numbers, int64, that an epoch takes, in no order of time."""
        drawn = []
        for place, (source, rule) in enumerate(self.uses):
            start, stop = self.sources.starts[source], self.sources.starts[source + 1]
            rng = np.random.default_rng([seed, 0 if rule.fixed else epoch, place, 0])
            drawn.append((start + rule.draw(usable[start:stop], rng)).astype(np.int64))
        return drawn


def open_mixture(
    data_path: Sequence[str],
    image_folder: str | None,
    data_root: str | None = None,
    cache_dir: str | None = None,
    cache_limit: str | None = None,
) -> Mixture:
    """Open everything `data_path` names.

    Args:
        data_path: annotation files, shard folders, s3://… and mixture files (.yaml, .yml).
        image_folder: what image paths of annotations start from.
        data_root: what relative paths inside mixtures start from; default: the working directory.
        cache_dir: shards of S3 are kept in its folder `shards`.
        cache_limit: how much they may take, as in 100gb; default: no limit.

    Raises:
        DataError: nothing is named, or something cannot be opened; the message names all that cannot.
    """
    wanted: list[tuple[str, SamplingRule]] = []
    for path in data_path:
        if Path(path).suffix in (".yaml", ".yml"):
            wanted += read_mixture(Path(path), data_root)
        else:
            wanted.append((path, SamplingRule()))
    if not wanted:
        raise DataError("no data: data_path names no annotation file, shard folder or mixture")
    cache = ShardCache(Path(cache_dir, "shards"), to_bytes(cache_limit) if cache_limit else None) if cache_dir else None

    def attempt(path: str) -> SampleSource | DataError:
        try:
            return open_source(path, image_folder, cache)
        except DataError as error:
            return error

    paths = list(dict.fromkeys(path for path, _ in wanted))
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # an index in a store takes its time to come
        opened = list(pool.map(attempt, paths))
    errors = [source for source in opened if isinstance(source, DataError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
        raise DataError(f"{len(errors)} of {len(paths)} data sets cannot be opened:\n{lines}") from errors[0]
    places = {path: place for place, path in enumerate(paths)}
    sources = [source for source in opened if not isinstance(source, DataError)]
    return Mixture(SourceList(sources), [(places[path], rule) for path, rule in wanted])


def describe_mixture(mixture: Mixture, usable: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, seed: int) -> str:
    """A table of the first epoch: for each use of a source its samples, tokens, tiles and share of all tokens.

    Args:
        mixture: opened.
        usable: [samples] bool over all sources.
        tokens: [samples] of each.
        tiles: [samples] of each.
        seed: of the data order.
    """
    names: list[tuple[str, str]] = []
    counts: list[list[int]] = []
    for (source, rule), drawn in zip(mixture.uses, mixture.draw_uses(usable, seed, 0), strict=True):
        held = int(mixture.sources.starts[source + 1] - mixture.sources.starts[source])
        names.append((mixture.sources.sources[source].name, str(rule)))
        sums = [int(lengths[drawn].sum(dtype=np.int64)) for lengths in (tokens, tiles)]
        counts.append([held, len(drawn), *sums])
    total = [sum(column) for column in zip(*counts, strict=True)]
    rows: list[tuple[str, ...]] = [("data set", "rule", "samples", "per epoch", "tokens", "tiles", "share of tokens")]
    for name, numbers in zip([*names, ("all", "")], [*counts, total], strict=True):
        share = f"{100 * numbers[2] / max(total[2], 1):.2f} %"
        rows.append((*name, *(f"{number:,}" for number in numbers), share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        )
        for row in rows
    )
