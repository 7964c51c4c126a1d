"""A packed row as one rank computes with it.

Every rank of a model-parallel group reads the same row and needs another part of it. The part, and every index that the
model needs, is made in the loader's worker. The training process only copies it to the device: anything that it
computed on a tensor as long as a row would keep a GPU waiting, because it would compete with the workers for the
processor.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_vlm.config.training import LossNormalization
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.data.rows.document_layout import DocumentLayout, document_layout
from megatron_vlm.data.rows.loss_weights import token_weights
from megatron_vlm.data.rows.tensor_tree import map_leaves


@dataclass(frozen=True)
class RankView:
    """Which part of every row a rank computes with. Pairs are (rank, size)."""

    is_first_stage: bool
    is_last_stage: bool
    context: tuple[int, int]
    """Context ranks take contiguous slices of the row."""
    sequence: tuple[int, int]
    """Under sequence parallelism, tensor ranks take contiguous slices of the context slice; otherwise (0, 1)."""
    tile_ranks: int
    """Ranks that share the tiles of a row."""
    tower_sequence_ranks: int
    """Tensor ranks that the tower's sequence is split over: its length must be a multiple."""
    tokens_per_tile: int
    """Tokens of a tile inside the vision tower, class token included."""
    patches_per_tile: int
    groups_documents: bool
    """Whether the language model's attention kernel reads groups of documents."""
    groups_tiles: bool
    """Whether the vision tower's attention kernel reads groups of documents."""
    loss_normalization: LossNormalization
    by_dataset: bool = False
    """Whether losses are reported for each dataset."""

    def tiles_per_rank(self, num_tiles: int) -> int:
        """Tiles that each rank encodes, zero tiles included; at least one."""
        return max(1, -(-num_tiles // self.tile_ranks))


@dataclass
class RankBatch:
    """Part of a row: s tokens of its S on this context rank, and what the rank's pipeline stages read of them."""

    positions: torch.Tensor
    """[S] int32: position ids of the whole row, from 0 in each document."""
    documents: DocumentLayout
    """Of the whole row: the attention kernel sees whole documents."""
    num_tiles: int
    """Of the whole row."""
    num_tokens: int
    """S without the padded tail."""
    squared_tokens: int
    """Sum of the documents' squared lengths, without the padded tail."""
    row_index: int
    sample_ids: list[str]
    tokens: torch.Tensor | None = None
    """[s] int64; on the first stage."""
    tiles: torch.Tensor | None = None
    """[n, 3, image_size, image_size] uint8: the tiles that this rank encodes, without the zero tiles that follow."""
    tile_documents: DocumentLayout | None = None
    """Tiles of this rank as documents, zero tiles and padding included; on the first stage."""
    feature_positions: torch.Tensor | None = None
    """[n] int64: image tokens in this rank's slice of the embeddings, counted from its first token; first stage."""
    feature_sources: torch.Tensor | None = None
    """[n] int64: which feature each of them takes, as a row of image_merge's table; on the first stage."""
    bilinear_sources: torch.Tensor | None = None
    """As in PackedBatch; on the first stage."""
    bilinear_weights: torch.Tensor | None = None
    supervised: torch.Tensor | None = None
    """[m] int64: supervised tokens, counted from the first token of the context slice; on the last stage."""
    targets: torch.Tensor | None = None
    """[m] int64: what they predict; on the last stage."""
    token_weights: torch.Tensor | None = None
    """[m] float32: how much each of them counts in the loss; None: 1. See loss_weights.py."""
    token_datasets: torch.Tensor | None = None
    """[m] int64: index of the dataset of each of them, if the view is by dataset; on the last stage."""
    num_supervised: int = 0
    """m"""
    loss_weight: float = 0.0
    """Sum of the weights."""

    def pin_memory(self) -> RankBatch:
        """A copy in page-locked memory, for asynchronous copies to a GPU. Called by torch's DataLoader."""
        return map_leaves(self, torch.Tensor, torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> RankBatch:
        """A copy on `device`; from page-locked memory, without waiting for it."""
        return map_leaves(self, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))


AnyBatch = PackedBatch | RankBatch


def rank_batch(batch: PackedBatch, view: RankView) -> RankBatch:
    """A rank's part of a row, on the host."""
    row = RankBatch(
        positions=batch.positions.to(torch.int32),
        documents=document_layout(batch.cu_seqlens, causal=True, grouped=view.groups_documents),
        num_tiles=batch.num_tiles,
        num_tokens=batch.num_tokens,
        squared_tokens=sum(
            (stop - start) ** 2 for start, stop in itertools.pairwise(batch.cu_seqlens) if stop <= batch.num_tokens
        ),
        row_index=batch.row_index,
        sample_ids=batch.sample_ids,
    )
    rank, ranks = view.context
    length = len(batch.tokens) // ranks
    here = slice(rank * length, (rank + 1) * length)
    if view.is_first_stage:
        row.tokens = batch.tokens[here]
        row.tiles, row.tile_documents = batch.tiles, tile_documents(batch.num_tiles, view)
        row.feature_positions, row.feature_sources = _features(batch, view, here.start, length)
        row.bilinear_sources, row.bilinear_weights = batch.bilinear_sources, batch.bilinear_weights
    if view.is_last_stage:
        labels = batch.labels[here]
        row.supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
        row.targets = labels[row.supervised]
        row.num_supervised, row.loss_weight = len(row.supervised), float(len(row.supervised))
        if view.loss_normalization != "token":
            weights = token_weights(batch, view.loss_normalization)[here]
            row.token_weights, row.loss_weight = weights[row.supervised].float(), float(weights.sum())
        if view.by_dataset:
            row.token_datasets = _dataset_of_tokens(batch)[here][row.supervised]
    return row


def _dataset_of_tokens(batch: PackedBatch) -> torch.Tensor:
    """[S] index of the dataset of each token; 0 in the padded tail, which has no supervised token."""
    lengths = torch.tensor(batch.cu_seqlens).diff()
    of_documents = torch.tensor(batch.datasets + [0] * (len(lengths) - len(batch.datasets)))
    return of_documents.repeat_interleave(lengths)


def tile_documents(num_tiles: int, view: RankView) -> DocumentLayout:
    """The tiles that a rank encodes as documents of one sequence, padded to what the tower's tensor ranks share."""
    tiles = view.tiles_per_rank(num_tiles)
    cu_seqlens = [view.tokens_per_tile * tile for tile in range(tiles + 1)]
    padding = -cu_seqlens[-1] % view.tower_sequence_ranks
    if padding:
        cu_seqlens.append(cu_seqlens[-1] + padding)
    return document_layout(cu_seqlens, causal=False, grouped=view.groups_tiles)


def _features(batch: PackedBatch, view: RankView, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RankBatch.feature_positions and feature_sources.

    The table holds the features of all ranks' tiles, zero tiles included, then the newline, then bilinear features.
    """
    rank, ranks = view.sequence
    length //= ranks
    positions = batch.feature_positions - (first + rank * length)
    here = (positions >= 0) & (positions < length)
    sources = batch.feature_sources[here]
    newline = view.tile_ranks * view.tiles_per_rank(batch.num_tiles) * view.patches_per_tile
    return positions[here], torch.where(sources < 0, newline - 1 - sources, sources)
