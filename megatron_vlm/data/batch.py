"""One packed row as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

IGNORE_INDEX = -100


@dataclass
class PackedBatch:
    """A micro-batch: one row of documents laid end to end, image positions already reserved.

    Every rank of a model-parallel group holds the same row; each takes its own slice of it later.

    Shapes: S is the row's length, T the tiles of the row, N the positions that image features fill.
    """

    tokens: torch.Tensor
    """[S] int64. Image positions hold the model's image_token_index; the tail is padding."""
    labels: torch.Tensor
    """[S] int64, already shifted: labels[i] is the target of position i, or IGNORE_INDEX."""
    positions: torch.Tensor
    """[S] int64, from 0 in each document."""
    bounds: list[int]
    """Document boundaries, 0 first and S last. A padded tail is a document of its own, without labels."""
    feature_positions: torch.Tensor
    """[N] int64, ascending: the positions in the row that image features fill."""
    feature_sources: torch.Tensor
    """[N] int64: which feature fills each of them; tile t's patch p is t * patches_per_tile + p, and -1 is the newline."""
    num_tiles: int
    """T: tiles of the whole row, whether or not this rank holds any."""
    tiles: torch.Tensor | None = None
    """[n, 3, image_size, image_size] float32, normalised: the tiles this rank encodes (see tile_range); None where none."""
    sample_ids: list[str] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens of real documents: S minus the padded tail."""


def tile_range(num_tiles: int, rank: int, size: int) -> tuple[int, int]:
    """The tiles [start, stop) of a row that member `rank` of `size` encoding ranks is dealt.

    Every rank is dealt ceil(num_tiles / size) places, in order; the last ranks may have fewer tiles than places or none.
    """
    each = -(-num_tiles // size)
    return min(rank * each, num_tiles), min((rank + 1) * each, num_tiles)
