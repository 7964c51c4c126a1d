"""How image features reach the embeddings, whatever the layout.

    my tiles -> tower -> projector -> gather over the tensor x context group -> every rank writes the features whose
    positions lie in its own slice of the row

The gather's backward is a reduce-scatter that sums, because each rank has used other features. The loader has worked
out which feature goes where (unpadding and newlines included), so that merging is one indexed read and one indexed
write.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_vlm.config import ParallelConfig
from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.data.processing.tiling import normalise_tiles
from megatron_vlm.model.projector import Projector
from megatron_vlm.model.vision import VisionTower
from megatron_vlm.runtime.process_groups import tile_shard_rank


def encode_tiles(
    tower: VisionTower, projector: Projector, batch: PackedBatch, parallel: ParallelConfig, *, tower_is_frozen: bool
) -> torch.Tensor:
    """Features of all tiles of the row, [places, patches, H], on every rank of the tensor x context group.

    `places` is at least the row's number of tiles: tiles are dealt in equal numbers, and what a rank lacks it fills
    with zero tiles. A row without images still encodes one zero tile per rank: a rank that skipped the tower would
    leave its data-parallel peers waiting for gradients.
    """
    _, ranks = tile_shard_rank(parallel)
    each = max(1, -(-batch.num_tiles // ranks))
    tiles = _normalised(batch.tiles, each, tower)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not tower_is_frozen):
        encoded = tower(tiles)
    if tower_is_frozen:
        encoded = encoded.detach()  # megatron-core's block re-enables gradients inside
    mine = projector(encoded[:, 0])
    group = parallel_state.get_tensor_and_context_parallel_group()
    if group.size() > 1:
        mine = tensor_parallel.gather_from_sequence_parallel_region(
            mine.contiguous(), tensor_parallel_output_grad=True, group=group
        )
    shares = mine.view(ranks, -1, mine.shape[-1])
    return torch.cat([tower.drop_class_tokens(share, each) for share in shares])


def _normalised(pixels: torch.Tensor | None, count: int, tower: VisionTower) -> torch.Tensor:
    """`count` tiles for the tower; what is missing is zero."""
    vision, weight = tower.vision, tower.patch_embedding.weight
    if pixels is None:
        return weight.new_zeros(count, 3, vision.image_size, vision.image_size)
    pixels = pixels.to(weight.device, non_blocking=True)
    tiles = normalise_tiles(pixels, vision.image_mean, vision.image_std).to(weight.dtype)
    missing = count - len(tiles)
    return torch.cat([tiles, tiles.new_zeros(missing, *tiles.shape[1:])]) if missing else tiles


def place_features(
    hidden: torch.Tensor, features: torch.Tensor, newline: torch.Tensor, batch: PackedBatch, first_position: int
) -> torch.Tensor:
    """Write features over the reserved positions of this rank's slice.

    hidden [s, 1, H] is the slice of the row that starts at `first_position`; features [places, patches, H];
    newline [H]. Sources count tiles of the row; places beyond them are zero tiles that nothing reads. Blends are made
    in the embeddings' type from features of that type.
    """
    table = torch.cat([features.flatten(0, 1), newline[None]]).to(hidden.dtype)
    positions = batch.feature_positions - first_position
    here = (positions >= 0) & (positions < len(hidden))
    rows, sources = positions[here].to(hidden.device), batch.feature_sources[here].to(hidden.device)
    newline_row = len(table) - 1
    if batch.bilinear_sources is not None and batch.bilinear_weights is not None:
        weights = batch.bilinear_weights.to(table)
        table = torch.cat([table, (table[batch.bilinear_sources.to(table.device)] * weights[..., None]).sum(1)])
    sources = torch.where(sources < 0, newline_row - 1 - sources, sources)  # -1 is the newline, -2 the blend after it
    merged = hidden.index_put((rows, torch.zeros_like(rows)), table[sources])
    # Weight 0: no feature may be outside the graph, or a row without images would leave parameters without gradient.
    return merged + 0.0 * table.sum(0)
