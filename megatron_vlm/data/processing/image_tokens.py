"""Which feature fills which position of an image: pure index computation.

Base view first, patch by patch; then the tiles as one big grid of patches, without the rows or columns that only hold
the black around the image, each row followed by the learned newline. LLaVA-NeXT's `spatial_unpad`; the rounding is
transformers' (`unpad_image` of LlavaNext), which gives the published counts too.

Under anyres_max_N a grid of much more patches than N tiles have is reduced bilinearly, as LLaVA-OneVision does: a
position is then filled by a blend of four features.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles, select_best_resolution

if TYPE_CHECKING:
    pass

NEWLINE = -1
FIRST_BILINEAR = -2
"""Blend b of an image or a row is FIRST_BILINEAR - b."""
_WORTH_REDUCING = 1.1
"""By how much a side must be too long."""


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


def _reduced(columns: int, rows: int, geometry: ImageGeometry) -> tuple[int, int]:
    """(columns, rows) that the patches of an image are reduced to; the same where they are few enough."""
    if geometry.max_patches is None:
        return columns, rows
    times = sqrt(columns * rows / geometry.max_patches)
    if times <= _WORTH_REDUCING:
        return columns, rows
    return max(int(columns // times), 1), max(int(rows // times), 1)


def _mosaic(size: Size, geometry: ImageGeometry) -> np.ndarray:
    """[rows, columns] features of the tiles as one grid, without the black around the image."""
    grid, patches = geometry.grid, geometry.patches_per_tile
    width, height = select_best_resolution(size, geometry.pinpoints)
    across, down = width // geometry.tile_size, height // geometry.tile_size
    tiles = np.arange(patches, patches * (1 + across * down), dtype=np.int64)
    # [tile row, tile column, patch row, patch column] -> one grid of patches
    mosaic = tiles.reshape(down, across, grid, grid).transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
    left, top, right, bottom = unpadded_window(size, across * grid, down * grid)
    return mosaic[top:bottom, left:right]


@lru_cache(maxsize=1024)
def feature_order(size: Size, geometry: ImageGeometry) -> np.ndarray:
    """An image's features in the order of its positions: tile * patches_per_tile + patch, NEWLINE, or a blend of
    `bilinear_features`. Read-only.
    """
    order = np.arange(geometry.patches_per_tile, dtype=np.int64)
    if geometry.tiled:
        mosaic = _mosaic(size, geometry)
        columns, rows = _reduced(mosaic.shape[1], mosaic.shape[0], geometry)
        if (rows, columns) != mosaic.shape:
            mosaic = FIRST_BILINEAR - np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
        newline = np.full((rows, 1), NEWLINE, dtype=np.int64)
        order = np.concatenate([order, np.concatenate([mosaic, newline], axis=1).reshape(-1)])
    order.setflags(write=False)
    return order


@lru_cache(maxsize=1024)
def bilinear_features(size: Size, geometry: ImageGeometry) -> tuple[np.ndarray, np.ndarray]:
    """What each blend of an image is made of: [blends, 4] features and [blends, 4] float32 weights, of sum 1."""
    none = np.empty((0, 4), np.int64), np.empty((0, 4), np.float32)
    if geometry.max_patches is None:
        return none
    mosaic = _mosaic(size, geometry)
    columns, rows = _reduced(mosaic.shape[1], mosaic.shape[0], geometry)
    if (rows, columns) == mosaic.shape:
        return none
    (top, bottom, down), (left, right, across) = (
        _neighbours(mosaic.shape[0], rows),
        _neighbours(mosaic.shape[1], columns),
    )
    corners = [mosaic[np.ix_(row, column)] for row in (top, bottom) for column in (left, right)]
    weights = [np.outer(row, column) for row in (1 - down, down) for column in (1 - across, across)]
    return np.stack(corners, axis=-1).reshape(-1, 4), np.stack(weights, axis=-1).reshape(-1, 4).astype(np.float32)


def _neighbours(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `after` places, its two neighbours of `before` and the weight of the second: torch's bilinear
    interpolation with align_corners=False.
    """
    place = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, before - 1), place - first


@lru_cache(maxsize=65536)
def num_image_tokens(size: Size, geometry: ImageGeometry) -> int:
    """Positions that an image of `size` (width, height) fills: the length of `feature_order`, without building it."""
    if not geometry.tiled:
        return geometry.patches_per_tile
    width, height = select_best_resolution(size, geometry.pinpoints)
    columns = width // geometry.tile_size * geometry.grid
    rows = height // geometry.tile_size * geometry.grid
    left, top, right, bottom = unpadded_window(size, columns, rows)
    columns, rows = _reduced(right - left, bottom - top, geometry)
    return geometry.patches_per_tile + rows * (columns + 1)


class RowFeatures:
    """Where the features of a row's images go, image after image."""

    def __init__(self, geometry: ImageGeometry) -> None:
        self.geometry = geometry
        self.num_tiles = 0
        self._positions: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._blends: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._num_blends = 0

    def add(self, size: Size, start: int) -> None:
        """An image of `size` (width, height) whose positions begin at `start`."""
        order = feature_order(size, self.geometry)
        before = self.num_tiles * self.geometry.patches_per_tile
        shifted = np.where(order >= 0, order + before, np.where(order == NEWLINE, NEWLINE, order - self._num_blends))
        self._positions.append(np.arange(start, start + len(order)))
        self._sources.append(shifted)
        blends, weights = bilinear_features(size, self.geometry)
        self._blends.append(blends + before)
        self._weights.append(weights)
        self._num_blends += len(blends)
        self.num_tiles += num_image_tiles(size, self.geometry)

    def fields(self) -> dict[str, Any]:
        """Those of PackedBatch: feature_positions, feature_sources, and where there are blends theirs."""
        none = np.empty(0, np.int64)
        fields = {
            "feature_positions": np.concatenate([none, *self._positions]),
            "feature_sources": np.concatenate([none, *self._sources]),
        }
        if self._num_blends:
            fields |= {
                "bilinear_sources": np.concatenate(self._blends),
                "bilinear_weights": np.concatenate(self._weights),
            }
        return {name: torch.from_numpy(array) for name, array in fields.items()}
