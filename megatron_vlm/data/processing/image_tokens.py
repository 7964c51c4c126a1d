"""Which vision feature replaces which image token, as indices only.

The features of the base view come first, in patch order. The features of the tiles follow, arranged as one grid of
patches: rows and columns that cover only the black padding are removed, and each row ends with the newline embedding
(`image_newline`). This is LLaVA-NeXT's `spatial_unpad`, with the rounding of `unpad_image` in transformers' LlavaNext.

Under anyres_max_N, a grid with many more patches than N tiles have is downsampled bilinearly, as in LLaVA-OneVision:
each image token is then replaced by a weighted sum of four features.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
import torch

from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles, select_best_resolution

NEWLINE = -1
FIRST_BILINEAR = -2
"""Bilinear feature b of an image or a row is FIRST_BILINEAR - b."""
_MIN_DOWNSAMPLING = 1.1
"""A grid whose sides exceed the limit by a smaller factor is kept, as in LLaVA-OneVision."""


def unpadded_window(size: Size, columns: int, rows: int) -> tuple[int, int, int, int]:
    """The part of a grid of patches that is not padding, as (left, top, right, bottom); `unpad_image` in transformers.

    Args:
        size: (width, height) of the image.
        columns: patches of a row of the grid.
        rows: patches of a column of the grid.
    """
    width, height = size
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return 0, margin, columns, rows - margin
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return margin, 0, columns - margin, rows


def _downsampled(columns: int, rows: int, geometry: ImageGeometry) -> tuple[int, int]:
    """(columns, rows) of a grid of patches after downsampling; unchanged if it has few enough patches."""
    if geometry.max_patches is None:
        return columns, rows
    factor = sqrt(columns * rows / geometry.max_patches)
    if factor <= _MIN_DOWNSAMPLING:
        return columns, rows
    return max(int(columns // factor), 1), max(int(rows // factor), 1)


def _feature_grid(size: Size, geometry: ImageGeometry) -> np.ndarray:
    """[rows, columns] int64: indices of the tiles' features as one grid of patches, without the padding."""
    grid, patches = geometry.grid, geometry.patches_per_tile
    width, height = select_best_resolution(size, geometry.pinpoints)
    across, down = width // geometry.tile_size, height // geometry.tile_size
    tiles = np.arange(patches, patches * (1 + across * down), dtype=np.int64)
    # [tile row, tile column, patch row, patch column] -> one grid of patches
    features = tiles.reshape(down, across, grid, grid).transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
    left, top, right, bottom = unpadded_window(size, across * grid, down * grid)
    return features[top:bottom, left:right]


@lru_cache(maxsize=1024)
def feature_order(size: Size, geometry: ImageGeometry) -> np.ndarray:
    """The feature that replaces each image token of an image, in the order of LLaVA-NeXT's `spatial_unpad`
    (`pack_image_features` of transformers' LlavaNext): base view, then the unpadded grid of tiles row by row.

    Args:
        size: upright (width, height) of the image.
        geometry: of tiles and patches.

    Returns:
        [num_image_tokens] int64, read-only: t * patches_per_tile + p for patch p of tile t (tile 0 is the base view),
        NEWLINE for the newline embedding, FIRST_BILINEAR - b for row b of `bilinear_features`.
    """
    order = np.arange(geometry.patches_per_tile, dtype=np.int64)
    if geometry.tiled:
        features = _feature_grid(size, geometry)
        columns, rows = _downsampled(features.shape[1], features.shape[0], geometry)
        if (rows, columns) != features.shape:
            features = FIRST_BILINEAR - np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
        newline = np.full((rows, 1), NEWLINE, dtype=np.int64)
        order = np.concatenate([order, np.concatenate([features, newline], axis=1).reshape(-1)])
    elif geometry.closing_newline:
        order = np.append(order, NEWLINE)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=1024)
def bilinear_features(size: Size, geometry: ImageGeometry) -> tuple[np.ndarray, np.ndarray]:
    """The B downsampled features of an image (B is 0 if its grid is not downsampled), as in LLaVA-OneVision.

    Returns:
        ([B, 4] int64: the features that each one interpolates; [B, 4] float32: their weights, which sum to 1).
    """
    none = np.empty((0, 4), np.int64), np.empty((0, 4), np.float32)
    if geometry.max_patches is None:
        return none
    features = _feature_grid(size, geometry)
    columns, rows = _downsampled(features.shape[1], features.shape[0], geometry)
    if (rows, columns) == features.shape:
        return none
    top, bottom, down = _interpolation(features.shape[0], rows)
    left, right, across = _interpolation(features.shape[1], columns)
    corners = [features[np.ix_(row, column)] for row in (top, bottom) for column in (left, right)]
    weights = [np.outer(row, column) for row in (1 - down, down) for column in (1 - across, across)]
    return np.stack(corners, axis=-1).reshape(-1, 4), np.stack(weights, axis=-1).reshape(-1, 4).astype(np.float32)


def _interpolation(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([after] first input index, [after] second input index, [after] weight of the second) of torch's bilinear
    interpolation from `before` to `after` points with align_corners=False.
    """
    position = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)
    first = position.astype(np.int64)
    return first, np.minimum(first + 1, before - 1), position - first


@lru_cache(maxsize=65536)
def num_image_tokens(size: Size, geometry: ImageGeometry) -> int:
    """Number of image tokens of an image: the length of its `feature_order`, without computing it.

    Without tiling, P = patches_per_tile (P + 1 with a closing newline); else P + rows * (columns + 1) for the unpadded
    (and downsampled) patch grid, where the 1 is the newline. `pack_image_features` of transformers returns as many
    features: LlavaNext's for anyres, LlavaOnevision's for anyres_max_N.

    Args:
        size: upright (width, height) of the image.
        geometry: of tiles and patches.
    """
    if not geometry.tiled:
        return geometry.patches_per_tile + int(geometry.closing_newline)
    width, height = select_best_resolution(size, geometry.pinpoints)
    columns = width // geometry.tile_size * geometry.grid
    rows = height // geometry.tile_size * geometry.grid
    left, top, right, bottom = unpadded_window(size, columns, rows)
    columns, rows = _downsampled(right - left, bottom - top, geometry)
    return geometry.patches_per_tile + rows * (columns + 1)


class RowFeatures:
    """Collects the image-token fields of a PackedBatch, image by image."""

    def __init__(self, geometry: ImageGeometry) -> None:
        self.geometry = geometry
        self.num_tiles = 0
        self._positions: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._bilinear_sources: list[np.ndarray] = []
        self._bilinear_weights: list[np.ndarray] = []
        self._num_bilinear = 0

    def add(self, size: Size, start: int, num_images: int = 1) -> None:
        """Add an image.

        Args:
            size: upright (width, height).
            start: position of its first image token in the row.
            num_images: images of its sample, before any truncation.
        """
        geometry = self.geometry.for_sample(num_images)
        order = feature_order(size, geometry)
        offset = self.num_tiles * self.geometry.patches_per_tile
        shifted = np.where(order >= 0, order + offset, np.where(order == NEWLINE, NEWLINE, order - self._num_bilinear))
        self._positions.append(np.arange(start, start + len(order)))
        self._sources.append(shifted)
        sources, weights = bilinear_features(size, geometry)
        self._bilinear_sources.append(sources + offset)
        self._bilinear_weights.append(weights)
        self._num_bilinear += len(sources)
        self.num_tiles += num_image_tiles(size, geometry)

    def fields(self) -> dict[str, Any]:
        """Fields of PackedBatch: feature_positions and feature_sources; bilinear_* if there are bilinear features."""
        none = np.empty(0, np.int64)
        fields = {
            "feature_positions": np.concatenate([none, *self._positions]),
            "feature_sources": np.concatenate([none, *self._sources]),
        }
        if self._num_bilinear:
            fields |= {
                "bilinear_sources": np.concatenate(self._bilinear_sources),
                "bilinear_weights": np.concatenate(self._bilinear_weights),
            }
        return {name: torch.from_numpy(array) for name, array in fields.items()}
