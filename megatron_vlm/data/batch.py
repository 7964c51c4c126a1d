"""One packed row as the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from megatron_vlm.data.processing.conversation import IGNORE_INDEX as IGNORE_INDEX
from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import RowFeatures
from megatron_vlm.data.processing.tiling import ImageGeometry, Size


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
    cu_seqlens: list[int]
    """Document boundaries, 0 first and S last. A padded tail is a document of its own, without labels."""
    feature_positions: torch.Tensor
    """[N] int64, ascending: the positions in the row that image features fill."""
    feature_sources: torch.Tensor
    """[N] int64: which feature fills each of them; tile t's patch p is t * patches_per_tile + p, -1 is the newline, and
    -2 - b is blend b.
    """
    num_tiles: int
    """T: tiles of the whole row, whether or not this rank holds any."""
    tiles: torch.Tensor | None = None
    """[n, 3, image_size, image_size] uint8: the tiles this rank encodes (see tile_range), if any."""
    sample_ids: list[str] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens of real documents: S minus the padded tail."""
    row_index: int = -1
    """Rows of all ranks that come before it since the start of training; -1: it is of no plan."""
    bilinear_sources: torch.Tensor | None = None
    """[B, 4] int64: the features that each blend is made of; None: the row has none. See merge.bilinear_features."""
    bilinear_weights: torch.Tensor | None = None
    """[B, 4] float32"""

    def pin_memory(self) -> PackedBatch:
        """The same in page-locked memory, from which a GPU copies while it computes. Called by torch's DataLoader."""
        pinned: dict[str, Any] = {
            part.name: value.pin_memory()
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), torch.Tensor)
        }
        return replace(self, **pinned)


def tile_range(num_tiles: int, rank: int, size: int) -> tuple[int, int]:
    """The tiles [start, stop) of a row that member `rank` of `size` encoding ranks is dealt.

    Every rank is dealt ceil(num_tiles / size) places, in order; the last ranks may have fewer tiles than places or
    none.
    """
    each = -(-num_tiles // size)
    return min(rank * each, num_tiles), min((rank + 1) * each, num_tiles)


@dataclass
class Document:
    """One encoded conversation of a row."""

    sample_id: str
    encoded: EncodedConversation
    image_sizes: list[Size]
    """Upright (width, height) of its images, in the order of their positions."""


def assemble_row(documents: Sequence[Document], seq_length: int, pad_id: int, geometry: ImageGeometry) -> PackedBatch:
    """Lay documents end to end and pad the rest; the tiles are left out.

    Labels are shifted within each document: its last position has none. A padded tail is a document of its own.

    Args:
        documents: together at most `seq_length` tokens.
        seq_length: S, the length of the row.
        pad_id: fills the tail.
        geometry: what the documents' images were encoded with.
    """
    ends = np.cumsum([len(document.encoded.ids) for document in documents])
    num_tokens = int(ends[-1])
    if num_tokens > seq_length:
        raise ValueError(f"{num_tokens} tokens in a row of {seq_length}")
    cu_seqlens = [0, *ends.tolist()] + ([seq_length] if num_tokens < seq_length else [])
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, IGNORE_INDEX, dtype=np.int64)
    positions = np.concatenate(
        [np.arange(stop - start) for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    )
    features = RowFeatures(geometry)
    for start, document in zip(cu_seqlens, documents, strict=False):
        stop = start + len(document.encoded.ids)
        tokens[start:stop] = document.encoded.ids
        labels[start : stop - 1] = document.encoded.labels[1:]
        for image_start, size in zip(document.encoded.image_starts, document.image_sizes, strict=True):
            features.add(size, start + image_start)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions.astype(np.int64)),
        cu_seqlens=cu_seqlens,
        num_tiles=features.num_tiles,
        **features.fields(),
        sample_ids=[document.sample_id for document in documents],
        num_tokens=num_tokens,
    )
