"""The samples of an epoch: which ones each entry of a mixture selects, and in which order they come."""

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
from megatron_vlm.data.sources.open_source import open_source
from megatron_vlm.data.sources.sample_source import SampleSource, SourceList
from megatron_vlm.data.sources.shard_shuffle import shuffle_keys

_OPEN_THREADS = 8


@dataclass
class Mixture:
    """Sources, and entries that sample from them. Several entries may sample from the same source."""

    sources: SourceList
    entries: list[tuple[int, SamplingRule]]
    """(index of the source, rule)"""

    def sample_epoch(self, usable: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Global sample numbers of one epoch in training order. They depend on the seed and the epoch alone.

        The samples of every entry are spread over the whole epoch (see `shuffle_keys`), so the proportions of the
        mixture stay constant within it.

        Args:
            usable: [samples] bool over all sources.
            seed: of the data order.
            epoch: from 0.
        """
        selected, keys = self.select(usable, seed, epoch), []
        for entry, (source, _) in enumerate(self.entries):
            rng = np.random.default_rng([seed, epoch, entry, 1])
            indices = selected[entry] - self.sources.starts[source]
            keys.append(shuffle_keys(indices, self.sources.sources[source].shard_starts, rng))
        order = np.argsort(np.concatenate(keys), kind="stable")
        return np.concatenate(selected)[order]

    def select(self, usable: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
        """The global sample numbers (int64, not in training order) that each entry takes in an epoch."""
        selected = []
        for entry, (source, rule) in enumerate(self.entries):
            start, stop = self.sources.starts[source], self.sources.starts[source + 1]
            rng = np.random.default_rng([seed, 0 if rule.fixed else epoch, entry, 0])
            selected.append((start + rule.select(usable[start:stop], rng)).astype(np.int64))
        return selected


def open_mixture(
    data_path: Sequence[str],
    image_folder: str | None,
    data_root: str | None = None,
    cache_dir: str | None = None,
    cache_limit: str | None = None,
) -> Mixture:
    """Open all sources that `data_path` lists.

    Args:
        data_path: whatever `open_source` takes, and mixture files (.yaml, .yml).
        image_folder: root of the image paths in annotations.
        data_root: root of the relative paths in mixture files; default: the working directory.
        cache_dir: shards from S3 are cached in its subfolder `shards`.
        cache_limit: maximum size of that cache, for example 100gb; default: no limit.

    Raises:
        DataError: `data_path` is empty, or sources cannot be opened. The message lists every one that cannot.
    """
    entries: list[tuple[str, SamplingRule]] = []
    for path in data_path:
        if Path(path).suffix in (".yaml", ".yml"):
            entries += read_mixture(Path(path), data_root)
        else:
            entries.append((path, SamplingRule()))
    if not entries:
        raise DataError("no data: data_path lists no annotation file, shard folder or mixture")
    cache = ShardCache(Path(cache_dir, "shards"), to_bytes(cache_limit) if cache_limit else None) if cache_dir else None

    def try_open(path: str) -> SampleSource | DataError:
        try:
            return open_source(path, image_folder, cache, cache_dir)
        except DataError as error:
            return error

    paths = list(dict.fromkeys(path for path, _ in entries))
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:  # reading an index from S3 is slow
        opened = list(pool.map(try_open, paths))
    errors = [source for source in opened if isinstance(source, DataError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
        raise DataError(f"{len(errors)} of {len(paths)} datasets cannot be opened:\n{lines}") from errors[0]
    index_of = {path: index for index, path in enumerate(paths)}
    sources = [source for source in opened if not isinstance(source, DataError)]
    return Mixture(SourceList(sources), [(index_of[path], rule) for path, rule in entries])


def describe_mixture(mixture: Mixture, usable: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, seed: int) -> str:
    """A table of the first epoch: the samples, tokens, tiles and share of all tokens of each entry.

    Args:
        mixture: opened.
        usable: [samples] bool over all sources.
        tokens: [samples] tokens of each sample.
        tiles: [samples] tiles of each sample.
        seed: of the data order.
    """
    names: list[tuple[str, str]] = []
    counts: list[list[int]] = []
    for (source, rule), selected in zip(mixture.entries, mixture.select(usable, seed, 0), strict=True):
        in_source = int(mixture.sources.starts[source + 1] - mixture.sources.starts[source])
        names.append((mixture.sources.sources[source].name, str(rule)))
        sums = [int(lengths[selected].sum(dtype=np.int64)) for lengths in (tokens, tiles)]
        counts.append([in_source, len(selected), *sums])
    total = [sum(column) for column in zip(*counts, strict=True)]
    rows: list[tuple[str, ...]] = [("dataset", "rule", "samples", "per epoch", "tokens", "tiles", "share of tokens")]
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
