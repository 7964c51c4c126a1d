"""Assembled rows: labels, positions, cu_seqlens, image features."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import NEWLINE, feature_order
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.rows.batch import IGNORE_INDEX, Document, assemble_row, tile_range
from tests.data.helpers import tiny_model

GEOMETRY = ImageGeometry.of(tiny_model(), "anyres")
X = IGNORE_INDEX
IMAGE = 500


def document(name: str, *ids: int, answer: int) -> Document:
    """Text only; the last `answer` ids are supervised."""
    labels = [X] * (len(ids) - answer) + list(ids[len(ids) - answer :])
    return Document(name, EncodedConversation(np.array(ids), np.array(labels), []), [])


def test_labels_are_shifted_inside_each_document() -> None:
    documents = [document("a", 1, 2, 3, 4, answer=2), document("b", 5, 6, 7, answer=3)]
    batch = assemble_row(documents, 10, 99, GEOMETRY)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 99, 99, 99]
    # if the whole row were shifted, the label of position 3 would be 5, the first token of the next document
    assert batch.labels.tolist() == [X, 3, 4, X, 6, 7, X, X, X, X]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert batch.cu_seqlens == [0, 4, 7, 10]
    assert (batch.num_tokens, batch.num_tiles, batch.sample_ids) == (7, 0, ["a", "b"])
    assert len(batch.feature_positions) == len(batch.feature_sources) == 0
    assert batch.tiles is None


def test_a_full_row_has_no_tail() -> None:
    batch = assemble_row([document("a", 1, 2, answer=1), document("b", 3, 4, 5, answer=1)], 5, 99, GEOMETRY)
    assert batch.cu_seqlens == [0, 2, 5] and batch.num_tokens == 5


def test_a_tail_of_one_token() -> None:
    batch = assemble_row([document("a", 1, 2, answer=1)], 3, 99, GEOMETRY)
    assert batch.cu_seqlens == [0, 2, 3] and batch.tokens[2] == 99 and batch.labels[1:].tolist() == [X, X]


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="3 tokens in a row of 2"):
        assemble_row([document("a", 1, 2, 3, answer=1)], 2, 99, GEOMETRY)


def test_features_of_several_images() -> None:
    """Two images in one document and one in the next: tile indices run through the row."""
    sizes = [[(16, 8), (5, 5)], [(8, 16)]]
    tiles = [[3, 2], [3]]
    documents = []
    for name, images in zip("ab", sizes, strict=True):
        ids, image_starts = [7], []
        for size in images:
            image_starts.append(len(ids))
            ids += [IMAGE] * len(feature_order(size, GEOMETRY)) + [8]
        encoded = EncodedConversation(np.array(ids), np.full(len(ids), X), image_starts)
        documents.append(Document(name, encoded, images))
    batch = assemble_row(documents, 80, 99, GEOMETRY)
    assert batch.num_tiles == 8
    np.testing.assert_array_equal(batch.feature_positions, np.flatnonzero(batch.tokens == IMAGE))
    sources, at, tile = batch.feature_sources.numpy(), 0, 0
    for images, counts in zip(sizes, tiles, strict=True):
        for size, count in zip(images, counts, strict=True):
            order = feature_order(size, GEOMETRY)
            expected = np.where(order == NEWLINE, NEWLINE, order + 4 * tile)
            np.testing.assert_array_equal(sources[at : at + len(order)], expected)
            at, tile = at + len(order), tile + count
    assert at == len(sources)
    assert set(sources[sources >= 0]) == set(range(8 * 4))  # these images fill their grids: every feature is used


@pytest.mark.parametrize(("tiles", "size"), [(0, 3), (1, 4), (7, 2), (8, 4), (9, 4), (5, 1)])
def test_tile_ranges_cover_all_tiles(tiles: int, size: int) -> None:
    ranges = [tile_range(tiles, rank, size) for rank in range(size)]
    assert [tile for start, stop in ranges for tile in range(start, stop)] == list(range(tiles))
    assert max(stop - start for start, stop in ranges) <= -(-tiles // size)
