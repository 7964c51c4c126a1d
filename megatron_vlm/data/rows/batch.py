"""One packed row as the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vlm.data.processing.conversation import IGNORE_INDEX as IGNORE_INDEX
from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import RowFeatures
from megatron_vlm.data.processing.tiling import ImageGeometry, Size
from megatron_vlm.data.rows.tensor_tree import map_leaves


@dataclass
class PackedBatch:
    """A micro-batch: one row of documents packed end to end, with its image tokens already expanded.

    Every rank of a model-parallel group reads the same row; `rank_batch` then takes the part that a rank computes with.

    Shapes: S is seq_length, T the number of tiles of the row, N the number of its image tokens.
    """

    tokens: torch.Tensor
    """[S] int64. Image tokens have the model's image_token_index; the tail is padding."""
    labels: torch.Tensor
    """[S] int64, already shifted: labels[i] is the target of position i, or IGNORE_INDEX."""
    positions: torch.Tensor
    """[S] int64: position ids, from 0 in each document."""
    cu_seqlens: list[int]
    """Cumulative lengths of the documents, from 0 to S. A padded tail counts as a document without labels."""
    feature_positions: torch.Tensor
    """[N] int64, ascending: the positions of the image tokens in the row."""
    feature_sources: torch.Tensor
    """[N] int64: the feature that replaces each image token. t * patches_per_tile + p is patch p of tile t, -1 is the
    newline embedding, -2 - b is bilinear feature b.
    """
    num_tiles: int
    """T: tiles of the whole row, whether or not this rank encodes any of them."""
    tiles: torch.Tensor | None = None
    """[n, 3, image_size, image_size] uint8: the tiles that this rank encodes (see tile_range), if any."""
    sample_ids: list[str] = field(default_factory=list)
    """Of each document, without the padded tail."""
    datasets: list[int] = field(default_factory=list)
    """Index of the dataset (source) of each document, without the padded tail."""
    num_tokens: int = 0
    """S without the padded tail."""
    row_index: int = -1
    """Index of the row in the run, counted over all ranks; -1: the row was not planned."""
    bilinear_sources: torch.Tensor | None = None
    """[B, 4] int64: the four features that each bilinear feature interpolates, see image_tokens.bilinear_features;
    None: the row has none.
    """
    bilinear_weights: torch.Tensor | None = None
    """[B, 4] float32"""

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory, for asynchronous copies to a GPU. Called by torch's DataLoader."""
        return map_leaves(self, torch.Tensor, torch.Tensor.pin_memory)


def tile_range(num_tiles: int, rank: int, size: int) -> tuple[int, int]:
    """The tiles [start, stop) of a row that rank `rank` of the `size` ranks that share a row's tiles runs the vision
    tower on.

    Ranks get contiguous blocks of ceil(num_tiles / size) tiles. The last ranks may get fewer or none.
    """
    block = -(-num_tiles // size)
    return min(rank * block, num_tiles), min((rank + 1) * block, num_tiles)


@dataclass
class Document:
    """One encoded conversation of a row."""

    sample_id: str
    encoded: EncodedConversation
    image_sizes: list[Size]
    """Upright (width, height) of each image, in the order of appearance."""
    dataset: int = 0
    """Index of the dataset (source) that it is from."""
    num_images: int = 0
    """Images of the whole sample, if it was truncated: they decide how each image is tiled."""


def assemble_row(documents: Sequence[Document], seq_length: int, pad_id: int, geometry: ImageGeometry) -> PackedBatch:
    """Pack documents end to end and pad the row to seq_length. `tiles` is left as None.

    Labels are shifted within each document, so its last position has no label. A padded tail is a document of its own.

    Args:
        documents: of at most `seq_length` tokens in total.
        seq_length: S, the length of the row.
        pad_id: token id of the padding.
        geometry: the one the documents' images were encoded with.

    Raises:
        ValueError: the documents have more than `seq_length` tokens.
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
        num_images = max(document.num_images, len(document.image_sizes))
        for image_start, size in zip(document.encoded.image_starts, document.image_sizes, strict=True):
            features.add(size, start + image_start, num_images)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions.astype(np.int64)),
        cu_seqlens=cu_seqlens,
        num_tiles=features.num_tiles,
        **features.fields(),
        sample_ids=[document.sample_id for document in documents],
        datasets=[document.dataset for document in documents],
        num_tokens=num_tokens,
    )
