"""Images to tiles: which grid an image is cut at, and the cutting.

The rule is LLaVA-NeXT's anyres: the base view is the whole image resized to one tile, ignoring its aspect ratio;
besides, the image is resized, keeping its aspect ratio, into the best of some resolutions, centred on black, and cut
row by row.

Tiles are kept as pixels, a byte each, until the device that encodes them normalises them: a quarter of the bytes to
hand from process to process and to copy to a GPU, and the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
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
    def max_patches(self) -> int | None:
        """Patches that an image's grid is reduced to under anyres_max_N, roughly; None: it is left as it is."""
        tiles = self.aspect_ratio.removeprefix("anyres_max_")
        return int(tiles) * self.patches_per_tile if tiles.isdigit() else None


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
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
def num_image_tiles(size: Size, geometry: ImageGeometry) -> int:
    """Tiles of an image of `size` (width, height), base view included."""
    if not geometry.tiled:
        return 1
    width, height = select_best_resolution(size, geometry.pinpoints)
    return 1 + (width // geometry.tile_size) * (height // geometry.tile_size)


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


def _views(image: Image.Image, geometry: ImageGeometry, start: int, stop: int) -> Iterator[Image.Image]:
    """Tiles [start, stop) of an RGB image."""
    side = geometry.tile_size
    if geometry.aspect_ratio == "square":
        yield _centre_square(image, side)
    elif geometry.aspect_ratio == "pad":
        yield _padded_square(image, geometry)
    else:
        if start == 0:
            yield image.resize((side, side), Image.Resampling.BICUBIC)
        if stop > 1:
            target = select_best_resolution(image.size, geometry.pinpoints)
            canvas = _fit_on_black(image, target)
            columns = target[0] // side
            for index in range(max(start - 1, 0), stop - 1):
                left, top = index % columns * side, index // columns * side
                yield canvas.crop((left, top, left + side, top + side))


def extract_tiles_into(tiles: np.ndarray, image: Image.Image, geometry: ImageGeometry, start: int) -> None:
    """Write tiles of an image, from tile `start` on as many as there is room for, as `extract_tiles` gives them."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    for tile, view in zip(tiles, _views(image, geometry, start, start + len(tiles)), strict=True):
        tile[:] = np.asarray(view).transpose(2, 0, 1)


def extract_tiles(image: Image.Image, geometry: ImageGeometry, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Tiles [start, stop) of an image, by default all: [t, 3, tile_size, tile_size] uint8, base view first."""
    stop = num_image_tiles(image.size, geometry) if stop is None else stop
    tiles = np.empty((stop - start, 3, geometry.tile_size, geometry.tile_size), np.uint8)
    extract_tiles_into(tiles, image, geometry, start)
    return tiles


def normalise_tiles(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels / 255 - mean) / std in float32, the same bits on every device.

    Args:
        pixels: [n, 3, P, P] uint8.
        mean: of red, green and blue, in 0..1.
        std: likewise.
    """
    # Tensors all three: by a plain number a GPU multiplies with its reciprocal, which rounds another way.
    full, centre, spread = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        for values in ([255.0], mean, std)
    )
    tiles = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    for tile, values in zip(tiles, pixels, strict=True):  # one at a time: it stays in a CPU's cache
        tile.copy_(values).div_(full).sub_(centre).div_(spread)
    return tiles


def image_to_tiles(image: Image.Image, model: ModelConfig, aspect_ratio: str) -> np.ndarray:
    """All tiles of an image as the tower of a model sees them.

    Args:
        image: any mode; upright (see `images.decode_image`).
        model: its vision.image_size is the tile's side, its image_grid_pinpoints the resolutions.
        aspect_ratio: anyres; square (shortest edge resized, centre cropped) or pad (to a square): one tile.

    Returns:
        [t, 3, P, P] float32, normalised by the tower's mean and deviation; base view first, then the grid row by row.
    """
    geometry = ImageGeometry.of(model, aspect_ratio)
    return normalise_tiles(torch.from_numpy(extract_tiles(image, geometry)), geometry.mean, geometry.std).numpy()
