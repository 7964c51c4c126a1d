"""Images to tiles: which resolution an image is tiled at, and its tiles.

The rule is LLaVA-NeXT's anyres. The base view is the whole image resized to one tile, ignoring its aspect ratio. In
addition, the image is resized to fit the best of several resolutions, keeping its aspect ratio, centred on black, and
split into tiles row by row.

Tiles stay uint8 until the device that encodes them normalises them. Sending them between processes and to a GPU takes a
quarter of the bytes of float32, and the values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    """Everything that determines the tiles and image tokens of an image of a given size.

    Its repr is part of the cache key of the length index: renaming a field makes all lengths be measured again.
    """

    tile_size: int
    """Side of a tile, pixels."""
    grid: int
    """Patches along one side of a tile."""
    pinpoints: tuple[Size, ...]
    """(width, height) of the resolutions that images may be tiled at."""
    aspect_ratio: str
    """anyres, anyres_max_N, square or pad."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Of red, green and blue, in 0..1. Pixels are normalised with it, and `pad` pads with this colour."""
    std: tuple[float, float, float] = CLIP_STD
    multi_image: str = "same"
    """Of the images of a sample that has several, where one image is tiled: pad (one padded tile) or same."""
    closing_newline: bool = False
    """Whether the features of a single tile are followed by the newline."""

    @classmethod
    def of(cls, model: ModelConfig, aspect_ratio: str, multi_image: str = "same") -> ImageGeometry:
        """The geometry a model and the settings image_aspect_ratio and multi_image_aspect_ratio describe."""
        pinpoints = tuple((int(w), int(h)) for w, h in model.image_grid_pinpoints)
        vision = model.vision
        return cls(
            vision.image_size, vision.grid, pinpoints, aspect_ratio, vision.image_mean, vision.image_std, multi_image
        )

    def for_sample(self, num_images: int) -> ImageGeometry:
        """The geometry of each image of a sample that has so many, before any truncation."""
        return _padded_tile(self) if num_images > 1 and self.tiled and self.multi_image == "pad" else self

    @property
    def patches_per_tile(self) -> int:
        return self.grid * self.grid

    @property
    def tiled(self) -> bool:
        """Whether images have tiles in addition to the base view."""
        return self.aspect_ratio.startswith("anyres")

    @property
    def max_patches(self) -> int | None:
        """About how many patches the grid of an image is downsampled to under anyres_max_N; None: no downsampling."""
        tiles = self.aspect_ratio.removeprefix("anyres_max_")
        return int(tiles) * self.patches_per_tile if tiles.isdigit() else None


@lru_cache(maxsize=16)
def _padded_tile(geometry: ImageGeometry) -> ImageGeometry:
    """One padded tile and a newline: LLaVA-NeXT's and LLaVA-OneVision's form of the images of a multi-image sample."""
    return replace(geometry, aspect_ratio="pad", closing_newline=True)


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """(width, height) of the resolution to tile an image at; LLaVA-NeXT's `select_best_resolution`.

    It keeps the most pixels of the image; of several, it has the least padding; of those, it comes first.

    Args:
        size: (width, height) of the image, pixels.
        pinpoints: (width, height) of the resolutions to choose from.
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
    """Number of tiles of an image of `size` (width, height), base view included."""
    if not geometry.tiled:
        return 1
    width, height = select_best_resolution(size, geometry.pinpoints)
    return 1 + (width // geometry.tile_size) * (height // geometry.tile_size)


def _fit_on_black(image: Image.Image, target: Size) -> Image.Image:
    """Resize to fit `target`, keeping the aspect ratio, and centre on black."""
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
    """CLIP's preprocessing: resize the shortest edge to `side` and crop the centre."""
    if image.width <= image.height:
        size = (side, int(side * image.height / image.width))
    else:
        size = (int(side * image.width / image.height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def _padded_square(image: Image.Image, geometry: ImageGeometry) -> Image.Image:
    """Pad to a square with the mean colour, then resize."""
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
    """Write tiles [start, start + len(tiles)) of an image into `tiles`, [t, 3, tile_size, tile_size] uint8."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    for tile, view in zip(tiles, _views(image, geometry, start, start + len(tiles)), strict=True):
        tile[:] = np.asarray(view).transpose(2, 0, 1)


def extract_tiles(image: Image.Image, geometry: ImageGeometry, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Tiles [start, stop) of an image, all by default: [t, 3, tile_size, tile_size] uint8, base view first."""
    stop = num_image_tiles(image.size, geometry) if stop is None else stop
    tiles = np.empty((stop - start, 3, geometry.tile_size, geometry.tile_size), np.uint8)
    extract_tiles_into(tiles, image, geometry, start)
    return tiles


def normalise_tiles(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels / 255 - mean) / std in float32, bitwise equal on all devices.

    Args:
        pixels: [n, 3, P, P] uint8.
        mean: of red, green and blue, in 0..1.
        std: likewise.
    """
    max_value, mean_tensor, std_tensor = _channel_constants(tuple(mean), tuple(std), pixels.device)
    if pixels.device.type != "cpu":
        return pixels.float().div_(max_value).sub_(mean_tensor).div_(std_tensor)
    tiles = torch.empty(pixels.shape, dtype=torch.float32)
    for tile, values in zip(tiles, pixels, strict=True):  # one tile at a time fits a CPU's cache
        tile.copy_(values).div_(max_value).sub_(mean_tensor).div_(std_tensor)
    return tiles


@lru_cache(maxsize=16)
def _channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """255, mean and std as [3 or 1, 1, 1] float32. Copied to a device once: each copy would wait for it.

    All three are tensors: to divide by a number, a GPU multiplies by its reciprocal, which rounds differently.
    """
    white, means, stds = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in ((255.0,), mean, std)
    )
    return white, means, stds


def image_to_tiles(image: Image.Image, model: ModelConfig, aspect_ratio: str) -> np.ndarray:
    """All tiles of an image, normalised for a model's vision tower.

    Args:
        image: of any mode; upright (see `image_io.decode_image`).
        model: vision.image_size is the tile size P, image_grid_pinpoints the resolutions.
        aspect_ratio: anyres, anyres_max_N, or for a single tile: square (resize the shortest edge, crop the centre) or
            pad (pad to a square).

    Returns:
        [t, 3, P, P] float32, normalised with the vision tower's mean and std: base view, then the grid row by row.
    """
    geometry = ImageGeometry.of(model, aspect_ratio)
    return normalise_tiles(torch.from_numpy(extract_tiles(image, geometry)), geometry.mean, geometry.std).numpy()
