"""Merge image features into the token embeddings, in any parallel layout.

    this rank's tiles -> vision tower -> projector -> all-gather over the tensor x context group -> each rank writes the
    features of the image tokens in its slice of the row

Ranks use different features, so the backward of the all-gather is a reduce-scatter that sums. The loader decides which
feature belongs to which image token (unpadding and newlines included), so merging is one indexed read and one write.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_vlm.data.processing.tiling import normalise_tiles
from megatron_vlm.data.rows.rank_batch import RankBatch, RankView
from megatron_vlm.model.projector import Projector
from megatron_vlm.model.vision import VisionTower


def encode_tiles(
    tower: VisionTower, projector: Projector, row: RankBatch, view: RankView, *, tower_is_frozen: bool
) -> torch.Tensor:
    """Features of all tiles of the row, [padded tiles, patches, H], on every rank of the tensor x context group.

    Each rank encodes the same number of tiles; zero tiles fill up the last ranks' shards. A row without images still
    encodes one zero tile per rank: if a rank skipped the tower, its data-parallel peers would wait for its gradients.
    """
    tiles_per_rank = view.tiles_per_rank(row.num_tiles)
    tiles = _normalised(row.tiles, tiles_per_rank, tower)
    assert row.tile_documents is not None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not tower_is_frozen):
        encoded = tower(tiles, row.tile_documents)
    if tower_is_frozen:
        encoded = encoded.detach()  # megatron-core's block re-enables gradients inside
    features = projector(encoded[:, 0])
    group = parallel_state.get_tensor_and_context_parallel_group()
    if group.size() > 1:
        features = tensor_parallel.gather_from_sequence_parallel_region(
            features.contiguous(), tensor_parallel_output_grad=True, group=group
        )
    shards = features.view(view.tile_ranks, -1, features.shape[-1])
    return torch.cat([tower.drop_class_tokens(shard, tiles_per_rank) for shard in shards])


def _normalised(pixels: torch.Tensor | None, count: int, tower: VisionTower) -> torch.Tensor:
    """Normalised tiles [count, 3, image_size, image_size] for the tower, padded with zero tiles."""
    vision, weight = tower.vision, tower.patch_embedding.weight
    if pixels is None:
        return weight.new_zeros(count, 3, vision.image_size, vision.image_size)
    tiles = normalise_tiles(pixels, vision.image_mean, vision.image_std).to(weight.dtype)
    missing = count - len(tiles)
    return torch.cat([tiles, tiles.new_zeros(missing, *tiles.shape[1:])]) if missing else tiles


def merge_image_features(
    hidden: torch.Tensor, features: torch.Tensor, newline: torch.Tensor, row: RankBatch
) -> torch.Tensor:
    """Replace the embeddings of this rank's image tokens by image features.

    Args:
        hidden: [s, 1, H] embeddings of this rank's slice of the row.
        features: [padded tiles, patches, H] from `encode_tiles`; the row's tiles come first.
        newline: [H], the learned newline feature.
        row: says which feature each image token takes. Interpolated features have the dtype of `hidden`.

    Returns:
        [s, 1, H].
    """
    positions, sources = row.feature_positions, row.feature_sources
    assert positions is not None and sources is not None
    table = torch.cat([features.flatten(0, 1), newline[None]]).to(hidden.dtype)
    if row.bilinear_sources is not None and row.bilinear_weights is not None:
        weights = row.bilinear_weights.to(table.dtype)
        table = torch.cat([table, (table[row.bilinear_sources] * weights[..., None]).sum(1)])
    merged = hidden.index_put((positions, torch.zeros_like(positions)), table[sources])
    # Weight 0 keeps unused features in the graph: otherwise a row without images would give parameters no gradient.
    return merged + 0.0 * table.sum(0)
