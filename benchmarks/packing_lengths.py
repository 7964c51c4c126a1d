"""Sets of lengths to be packed: one shaped like the published instruction mix, and hostile ones.

`instruct_lengths.csv` describes 200,000 samples of that mix: for each number of tiles how many there are, and the
percentiles of their image and text tokens. A CSV of one sample a line can take its place.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHAPE_OF_THE_MIX = Path(__file__).parent / "instruct_lengths.csv"


@dataclass
class Samples:
    """Lengths of a data set in the order its samples come."""

    name: str
    tokens: np.ndarray
    """[n] int64, images included"""
    tiles: np.ndarray
    """[n] int64"""


def read_lengths(path: Path, rng: np.random.Generator) -> Samples:
    """A CSV with the columns image_tokens, tiles and text_tokens, one sample a line; shuffled."""
    with path.open(newline="") as file:
        rows = [(int(r["image_tokens"]) + int(r["text_tokens"]), int(r["tiles"])) for r in csv.DictReader(file)]
    tokens, tiles = rng.permutation(np.array(rows, np.int64)).T
    return Samples(path.stem, np.ascontiguousarray(tokens), np.ascontiguousarray(tiles))


def draw_mix(count: int, rng: np.random.Generator) -> Samples:
    """As many samples as asked for, distributed as `instruct_lengths.csv` says."""
    with SHAPE_OF_THE_MIX.open(newline="") as file:
        table = list(csv.DictReader(file))
    levels = [name for name in table[0] if name.startswith("p")]
    shares = {int(row["tiles"]): int(row["samples"]) for row in table}
    tiles = rng.choice(list(shares), count, p=np.array(list(shares.values())) / sum(shares.values()))
    tokens = np.zeros(count, np.int64)
    for row in table:
        mine = np.flatnonzero(tiles == int(row["tiles"]))
        percentiles = [float(name[1:]) for name in levels]
        # Between two percentiles on a logarithmic scale: tails are long.
        known = np.log1p([float(row[name]) for name in levels])
        drawn = np.expm1(np.interp(100 * rng.random(len(mine)), percentiles, known))
        tokens[mine] += np.rint(drawn).astype(np.int64)
    return Samples("instruction mix", tokens, tiles.astype(np.int64))


def hostile(mix: Samples, rng: np.random.Generator) -> Iterator[Samples]:
    """Sets of as many samples that are hard to pack: to fill rows with, to make even, or both."""
    count = len(mix.tokens)
    yield Samples("near 17,000 tokens", rng.integers(16_500, 17_501, count), np.full(count, 5))
    tokens = np.rint(rng.normal(17_000, 500, count)).astype(np.int64)
    yield Samples("near 17,000, some pair up", tokens, np.full(count, 5))
    text = rng.choice(mix.tokens[mix.tiles == 0], count)
    alone = rng.random(count) < 0.5
    yield Samples("half text-only", np.where(alone, text, mix.tokens), np.where(alone, 0, mix.tiles))
    yield Samples("all with 6 tiles", rng.choice(mix.tokens[mix.tiles == 6], count), np.full(count, 6))
