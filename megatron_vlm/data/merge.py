"""Which feature fills which position of an image: pure index computation.

Base view first, patch by patch; then the tiles as one big grid of patches, without the rows or columns that only hold
the black around the image, each row followed by the learned newline. LLaVA-NeXT's `spatial_unpad`; the rounding is
transformers' (`unpad_image` of LlavaNext), which gives the published counts too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.data.tiling import ImageGeometry, Size, select_grid

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig

NEWLINE = -1


def unpadded_window(size: Size, columns: int, rows: int) -> tuple[int, int, int, int]:
    """The part of a grid of patches that an image of `size` (width, height) covers, as (left, top, right, bottom)."""
    width, height = size
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return 0, margin, columns, rows - margin
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return margin, 0, columns - margin, rows


@lru_cache(maxsize=1024)
def feature_order(size: Size, geometry: ImageGeometry) -> np.ndarray:
    """An image's features in the order of its positions: tile * patches_per_tile + patch, or NEWLINE. Read-only."""
    grid, patches = geometry.grid, geometry.patches_per_tile
    base = np.arange(patches, dtype=np.int64)
    if geometry.aspect_ratio != "anyres":
        order = base
    else:
        width, height = select_grid(size, geometry.pinpoints)
        across, down = width // geometry.tile_size, height // geometry.tile_size
        tiles = np.arange(patches, patches * (1 + across * down), dtype=np.int64)
        # [tile row, tile column, patch row, patch column] -> one grid of patches
        mosaic = tiles.reshape(down, across, grid, grid).transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
        left, top, right, bottom = unpadded_window(size, across * grid, down * grid)
        mosaic = mosaic[top:bottom, left:right]
        newline = np.full((mosaic.shape[0], 1), NEWLINE, dtype=np.int64)
        order = np.concatenate([base, np.concatenate([mosaic, newline], axis=1).reshape(-1)])
    order.setflags(write=False)
    return order


@lru_cache(maxsize=65536)
def count_positions(size: Size, geometry: ImageGeometry) -> int:
    """Positions that an image of `size` (width, height) fills: the length of `feature_order`, without building it."""
    if geometry.aspect_ratio != "anyres":
        return geometry.patches_per_tile
    width, height = select_grid(size, geometry.pinpoints)
    columns = width // geometry.tile_size * geometry.grid
    rows = height // geometry.tile_size * geometry.grid
    left, top, right, bottom = unpadded_window(size, columns, rows)
    return geometry.patches_per_tile + (bottom - top) * (right - left + 1)


def merge_sources(size: Size, model: ModelConfig, aspect_ratio: str) -> np.ndarray:
    """Which feature fills each position of an image.

    Args:
        size: (width, height) of the image, pixels.
        model: its vision tower gives the patches of a tile, its image_grid_pinpoints the resolutions.
        aspect_ratio: anyres; square and pad have one tile and no newline.

    Returns:
        [positions] int64, read-only: tile * patches_per_tile + patch with the image's own tiles counted from 0 (the
        base view), or -1 for the newline.
    """
    return feature_order((int(size[0]), int(size[1])), ImageGeometry.of(model, aspect_ratio))


def num_image_tokens(size: Size, model: ModelConfig, aspect_ratio: str) -> int:
    """Positions an image fills: the length of `merge_sources`."""
    return count_positions((int(size[0]), int(size[1])), ImageGeometry.of(model, aspect_ratio))
