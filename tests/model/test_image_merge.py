"""Image features merged into the embeddings of a row."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import bilinear_features, feature_order, num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.rows.batch import Document, assemble_row
from megatron_vlm.data.rows.rank_batch import RankView, rank_batch
from megatron_vlm.model.image_merge import merge_image_features
from tests.data.helpers import tiny_model, view_of

MODE = "anyres_max_1"


def view(context: tuple[int, int]) -> RankView:
    """The 11 tiles are shared by two ranks: the last one encodes a zero tile, too."""
    return view_of(tiny_model(), context=context, tile_ranks=2)


def document(size: tuple[int, int]) -> Document:
    length = num_image_tokens(size, ImageGeometry.of(tiny_model(), MODE))
    ids = np.array([5, *[500] * length, 6])
    return Document("d", EncodedConversation(ids, np.full(len(ids), -100), [1]), [size])


def test_bilinear_features_are_merged_and_pass_gradients_in_every_slice() -> None:
    geometry = ImageGeometry.of(tiny_model(), MODE)
    sizes = [(16, 16), (5, 5), (24, 8)]
    batch = assemble_row([document(size) for size in sizes], 60, 0, geometry)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 4, 3, generator=generator, requires_grad=True)
    newline = torch.tensor([7.0, 8.0, 9.0], requires_grad=True)
    hidden = torch.zeros(60, 1, 3)
    row, *parts = (rank_batch(batch, view(context)) for context in [(0, 1), (0, 3), (1, 3), (2, 3)])
    whole = merge_image_features(hidden, features, newline, row)
    slices = [merge_image_features(hidden[:20], features, newline, part) for part in parts]
    torch.testing.assert_close(torch.cat(slices), whole)

    expected, table, first = torch.zeros(60, 3), features.flatten(0, 1), 0
    for start, size in zip(batch.cu_seqlens, sizes, strict=False):
        sources, weights = bilinear_features(size, geometry)
        for position, source in enumerate(feature_order(size, geometry).tolist()):
            if source >= 0:
                value = table[4 * first + source]
            elif source == -1:
                value = newline
            else:
                indices = torch.from_numpy(sources[-2 - source]) + 4 * first
                value = torch.from_numpy(weights[-2 - source]) @ table[indices]
            expected[start + 1 + position] = value
        first += {(16, 16): 5, (5, 5): 2, (24, 8): 4}[size]
    torch.testing.assert_close(whole[:, 0], expected)
    for merged in (whole, torch.cat(slices)):
        gradient = torch.autograd.grad((merged**2).sum(), features, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad((expected**2).sum(), features, retain_graph=True)[0])
