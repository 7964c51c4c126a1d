"""The part of a row that a rank computes with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.rows.batch import IGNORE_INDEX, Document, PackedBatch, assemble_row
from megatron_vlm.data.rows.loss_weights import token_weights
from megatron_vlm.data.rows.rank_batch import RankBatch, rank_batch, tile_documents
from tests.data.helpers import tiny_model, view_of

GEOMETRY = ImageGeometry.of(tiny_model(), "anyres")
S, CONTEXT, SEQUENCE = 96, 2, 3


@pytest.fixture(scope="module")
def row() -> PackedBatch:
    """Two documents with an image each, and a padded tail."""
    documents = []
    for name, size in [("a", (16, 16)), ("b", (5, 5))]:
        length = num_image_tokens(size, GEOMETRY)
        ids = np.array([5, *[500] * length, *range(6, 20)])
        labels = np.where(np.arange(len(ids)) % 3 == 0, ids, IGNORE_INDEX)
        documents.append(Document(name, EncodedConversation(ids, labels, [1]), [size]))
    batch = assemble_row(documents, S, 99, GEOMETRY)
    batch.row_index = 7
    return batch


def joined(parts: list[RankBatch], name: str, step: int = 0) -> torch.Tensor:
    """A field of all parts, each counted from `step` tokens after the one before."""
    return torch.cat([getattr(part, name) + step * number for number, part in enumerate(parts)])


def test_context_slices_together_are_the_row(row: PackedBatch) -> None:
    parts = [rank_batch(row, view_of(tiny_model(), context=(rank, CONTEXT))) for rank in range(CONTEXT)]
    assert torch.equal(joined(parts, "tokens"), row.tokens)
    supervised = (row.labels != IGNORE_INDEX).nonzero()[:, 0]
    assert torch.equal(joined(parts, "supervised", S // CONTEXT), supervised)
    assert torch.equal(joined(parts, "targets"), row.labels[supervised])
    assert [part.num_supervised for part in parts] == [len(part.supervised) for part in parts]  # type: ignore[arg-type]
    assert [part.loss_weight for part in parts] == [part.num_supervised for part in parts]
    for part in parts:  # attention sees whole documents
        assert torch.equal(part.positions, row.positions) and part.positions.dtype == torch.int32
        assert part.documents.cu_seqlens.tolist() == row.cu_seqlens


def test_weights_of_supervised_tokens_are_the_rows(row: PackedBatch) -> None:
    views = [view_of(tiny_model(), context=(rank, CONTEXT), loss_normalization="sample") for rank in range(CONTEXT)]
    parts = [rank_batch(row, view) for view in views]
    weights = token_weights(row, "sample")
    assert torch.equal(joined(parts, "token_weights"), weights[weights > 0].float())
    assert sum(part.loss_weight for part in parts) == pytest.approx(2)  # the row has two documents


def test_every_image_token_is_merged_by_one_rank(row: PackedBatch) -> None:
    ranks = [(c, t) for c in range(CONTEXT) for t in range(SEQUENCE)]
    parts = [
        rank_batch(row, view_of(tiny_model(), context=(c, CONTEXT), sequence=(t, SEQUENCE), tile_ranks=4))
        for c, t in ranks
    ]
    length = S // (CONTEXT * SEQUENCE)
    assert torch.equal(joined(parts, "feature_positions", length), row.feature_positions)
    # 7 tiles on 4 ranks: 2 each, so that the newline comes after 8 tiles of 4 patches
    expected = torch.where(row.feature_sources == -1, 32, row.feature_sources)
    assert torch.equal(joined(parts, "feature_sources"), expected)


def test_a_stage_gets_only_what_it_reads(row: PackedBatch) -> None:
    middle = rank_batch(row, view_of(tiny_model(), is_first_stage=False, is_last_stage=False, groups_documents=False))
    tensors = {name for name, value in vars(middle).items() if isinstance(value, torch.Tensor)}
    assert tensors == {"positions"} and middle.documents.groups == []
    assert (middle.num_tokens, middle.num_tiles, middle.row_index) == (row.num_tokens, row.num_tiles, 7)
    assert middle.sample_ids == ["a", "b"]


@pytest.mark.parametrize(("tiles", "expected"), [(0, [0, 5, 6]), (1, [0, 5, 6]), (7, [0, 5, 10])])
def test_tiles_of_a_rank_are_padded_to_what_tensor_ranks_share(tiles: int, expected: list[int]) -> None:
    """5 tokens a tile, 4 ranks that share the tiles and 2 that share each sequence."""
    layout = tile_documents(tiles, view_of(tiny_model(), tile_ranks=4, tower_sequence_ranks=2))
    assert layout.cu_seqlens.tolist() == expected
