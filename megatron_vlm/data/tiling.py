"""Images to tiles: which grid an image is cut at, and the cutting.

The rule is LLaVA-NeXT's anyres: the base view is the whole image resized to one tile, ignoring its aspect ratio;
besides, the image is resized, keeping its aspect ratio, into the best of some resolutions, centred on black, and cut
row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Size = tuple[int, int]
"""(width, height)"""


@dataclass(frozen=True)
class ImageGeometry:
    """All that decides how many tiles and positions an image of a given size has."""

    tile_size: int
    """Side of a tile, pixels."""
    grid: int
    """Patches along one side of a tile."""
    pinpoints: tuple[Size, ...]
    """Resolutions that images may be tiled at, (width, height)."""
    aspect_ratio: str
    """anyres, anyres_max_N, square or pad."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Of red, green and blue, in 0..1: pixels are normalised by it, and `pad` surrounds an image with it."""
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def of(cls, model: ModelConfig, aspect_ratio: str) -> ImageGeometry:
        """The geometry a model and data setting describe."""
        pinpoints = tuple((int(w), int(h)) for w, h in model.image_grid_pinpoints)
        vision = model.vision
        return cls(vision.image_size, vision.grid, pinpoints, aspect_ratio, vision.image_mean, vision.image_std)

    @property
    def patches_per_tile(self) -> int:
        return self.grid * self.grid

    @property
    def tiled(self) -> bool:
        """Images have tiles besides the base view."""
        return self.aspect_ratio.startswith("anyres")

    @property
    def most_patches(self) -> int | None:
        """Patches that an image's grid is reduced to under anyres_max_N, roughly; None: it is left as it is."""
        tiles = self.aspect_ratio.removeprefix("anyres_max_")
        return int(tiles) * self.patches_per_tile if tiles.isdigit() else None


def select_grid(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution to tile an image at, (width, height).

    The one that keeps most of the image's pixels; among equals the one that wastes least; among those the first.

    Args:
        size: (width, height) of the image, pixels.
        pinpoints: resolutions to choose from, (width, height).
    """
    width, height = size
    best, best_key = pinpoints[0], (-1, 0)
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, effective - w * h)
        if key > best_key:
            best, best_key = (w, h), key
    return best


@lru_cache(maxsize=65536)
def count_tiles(size: Size, geometry: ImageGeometry) -> int:
    """Tiles of an image of `size` (width, height), base view included."""
    if not geometry.tiled:
        return 1
    width, height = select_grid(size, geometry.pinpoints)
    return 1 + (width // geometry.tile_size) * (height // geometry.tile_size)


def tile_count(size: Size, model: ModelConfig, aspect_ratio: str) -> int:
    """Tiles of an image of `size` (width, height) under a model's settings, base view included."""
    return count_tiles((int(size[0]), int(size[1])), ImageGeometry.of(model, aspect_ratio))


def _fit_on_black(image: Image.Image, target: Size) -> Image.Image:
    """Resize into `target` keeping the aspect ratio, centre on black."""
    scale_w, scale_h = target[0] / image.width, target[1] / image.height
    if scale_w < scale_h:
        size = (target[0], min(ceil(image.height * scale_w), target[1]))
    else:
        size = (min(ceil(image.width * scale_h), target[0]), target[1])
    canvas = Image.new("RGB", target)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas


def _centre_square(image: Image.Image, side: int) -> Image.Image:
    """CLIP's own: resize the shortest edge to `side`, crop the centre."""
    if image.width <= image.height:
        size = (side, int(side * image.height / image.width))
    else:
        size = (int(side * image.width / image.height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def _padded_square(image: Image.Image, geometry: ImageGeometry) -> Image.Image:
    """Surround with the mean colour to a square, then resize."""
    longest = max(image.size)
    red, green, blue = (int(255 * value) for value in geometry.mean)
    canvas = Image.new("RGB", (longest, longest), (red, green, blue))
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return canvas.resize((geometry.tile_size, geometry.tile_size), Image.Resampling.BICUBIC)


def _normalise(views: list[Image.Image], geometry: ImageGeometry) -> np.ndarray:
    """[t, 3, P, P] float32 of RGB views of one size."""
    pixels = np.stack([np.asarray(view, dtype=np.float32) for view in views])
    mean, std = np.asarray(geometry.mean, dtype=np.float32), np.asarray(geometry.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def cut_tiles(image: Image.Image, geometry: ImageGeometry, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Tiles [start, stop) of an image, by default all: [t, 3, tile_size, tile_size] float32, base view first."""
    side = geometry.tile_size
    image = image.convert("RGB")
    total = count_tiles(image.size, geometry)
    stop = total if stop is None else stop
    if geometry.aspect_ratio == "square":
        views = [_centre_square(image, side)]
    elif geometry.aspect_ratio == "pad":
        views = [_padded_square(image, geometry)]
    else:
        views = [image.resize((side, side), Image.Resampling.BICUBIC)] if start == 0 else []
        if stop > 1:
            target = select_grid(image.size, geometry.pinpoints)
            canvas = _fit_on_black(image, target)
            columns = target[0] // side
            for index in range(max(start - 1, 0), stop - 1):
                left, top = index % columns * side, index // columns * side
                views.append(canvas.crop((left, top, left + side, top + side)))
    return _normalise(views, geometry)


def image_to_tiles(image: Image.Image, model: ModelConfig, aspect_ratio: str) -> np.ndarray:
    """All tiles of an image under a model's settings.

    Args:
        image: any mode; upright (see `images.decode_image`).
        model: its vision.image_size is the tile's side, its image_grid_pinpoints the resolutions.
        aspect_ratio: anyres; square (shortest edge resized, centre cropped) or pad (to a square): one tile.

    Returns:
        [t, 3, P, P] float32, normalised by the tower's mean and deviation; base view first, then the grid row by row.
    """
    return cut_tiles(image, ImageGeometry.of(model, aspect_ratio))
