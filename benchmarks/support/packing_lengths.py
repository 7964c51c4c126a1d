"""Sample lengths for the packing benchmark: the published instruction mix, and sets that are hard to pack.

`instruct_lengths.csv` describes 200,000 samples of that mix: for each tile count, the number of samples and the
percentiles of their image and text tokens. A CSV with one sample per line can replace it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIX_PERCENTILES = Path(__file__).parent / "instruct_lengths.csv"


@dataclass
class Samples:
    """Lengths of a data set, in the order of its samples."""

    name: str
    tokens: np.ndarray
    """[n] int64, image tokens included"""
    tiles: np.ndarray
    """[n] int64"""


def read_lengths(path: Path, rng: np.random.Generator) -> Samples:
    """Read a CSV with the columns image_tokens, tiles and text_tokens, one sample per line, and shuffle it."""
    with path.open(newline="") as file:
        rows = [(int(r["image_tokens"]) + int(r["text_tokens"]), int(r["tiles"])) for r in csv.DictReader(file)]
    tokens, tiles = rng.permutation(np.array(rows, np.int64)).T
    return Samples(path.stem, np.ascontiguousarray(tokens), np.ascontiguousarray(tiles))


def sample_mix(count: int, rng: np.random.Generator) -> Samples:
    """Sample `count` lengths from the distribution in `instruct_lengths.csv`."""
    with MIX_PERCENTILES.open(newline="") as file:
        table = list(csv.DictReader(file))
    columns = [name for name in table[0] if name.startswith("p")]
    shares = {int(row["tiles"]): int(row["samples"]) for row in table}
    tiles = rng.choice(list(shares), count, p=np.array(list(shares.values())) / sum(shares.values()))
    tokens = np.zeros(count, np.int64)
    for row in table:
        selected = np.flatnonzero(tiles == int(row["tiles"]))
        percentiles = [float(name[1:]) for name in columns]
        # Interpolated between percentiles on a logarithmic scale, because the tails are long.
        values = np.log1p([float(row[name]) for name in columns])
        sampled = np.expm1(np.interp(100 * rng.random(len(selected)), percentiles, values))
        tokens[selected] += np.rint(sampled).astype(np.int64)
    return Samples("instruction mix", tokens, tiles.astype(np.int64))


def hard_to_pack(mix: Samples, rng: np.random.Generator) -> Iterator[Samples]:
    """Sets of the same size whose rows are hard to fill, hard to balance, or both."""
    count = len(mix.tokens)
    yield Samples("near 17,000 tokens", rng.integers(16_500, 17_501, count), np.full(count, 5))
    tokens = np.rint(rng.normal(17_000, 500, count)).astype(np.int64)
    yield Samples("near 17,000, some pair up", tokens, np.full(count, 5))
    text = rng.choice(mix.tokens[mix.tiles == 0], count)
    text_only = rng.random(count) < 0.5
    yield Samples("half text-only", np.where(text_only, text, mix.tokens), np.where(text_only, 0, mix.tiles))
    yield Samples("all with 6 tiles", rng.choice(mix.tokens[mix.tiles == 6], count), np.full(count, 6))
