"""Splits images into tiles, and orders the features of the tiles for the prompt, as in training.

LLaVA-NeXT's anyres: the base view is the whole image resized to one tile, ignoring its aspect ratio. In addition the
image is resized with its aspect ratio to fit the best of some resolutions, centred on black, and split into tiles row
by row. All sizes are (width, height).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin

from .configuration_instellavl import PINPOINTS, InstellaVLConfig
from .constants import CLIP_MEAN, CLIP_STD

Size = tuple[int, int]


def select_grid(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The resolution that keeps most of the image's pixels; among equals the one with least padding, then the first."""
    width, height = size
    best, best_key = (0, 0), (-1, 0)
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if (kept, kept - w * h) > best_key:
            best, best_key = (w, h), (kept, kept - w * h)
    return best


def feature_order(size: Size, config: InstellaVLConfig) -> np.ndarray:
    """The feature of each image token: tile * patches per tile + patch, or -1 for the newline.

    First the base view, then the tiles as one grid of patches, without the rows or columns of padding, with a newline
    after each row (LLaVA-NeXT's spatial_unpad; rounding as in transformers' LlavaNext). A single tile has no newline.

    Returns:
        [image tokens] int64
    """
    side = config.vision_config.image_size
    grid = side // config.vision_config.patch_size
    base = np.arange(grid * grid)
    if config.image_aspect_ratio != "anyres":
        return base
    target = select_grid(size, config.image_grid_pinpoints)
    across, down = target[0] // side, target[1] // side
    tiles = np.arange(grid * grid, grid * grid * (1 + across * down)).reshape(down, across, grid, grid)
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
    rows, columns = mosaic.shape
    width, height = size
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        mosaic = mosaic[margin : rows - margin]
    else:
        margin = (columns - int(round(width * (rows / height), 7))) // 2
        mosaic = mosaic[:, margin : columns - margin]
    lines = np.concatenate([mosaic, np.full((len(mosaic), 1), -1)], axis=1)
    return np.concatenate([base, lines.reshape(-1)])


def _fit(image: Image.Image, target: Size) -> Image.Image:
    """Resize to fit `target` with the aspect ratio kept, and centre on black."""
    across, down = target[0] / image.width, target[1] / image.height
    if across < down:
        size = (target[0], min(ceil(image.height * across), target[1]))
    else:
        size = (min(ceil(image.width * down), target[0]), target[1])
    canvas = Image.new("RGB", target)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas


def _centre(image: Image.Image, side: int) -> Image.Image:
    """Resize the shortest edge to `side`, and crop the centre."""
    if image.width <= image.height:
        size = (side, int(side * image.height / image.width))
    else:
        size = (int(side * image.width / image.height), side)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def _pad(image: Image.Image, side: int, colour: tuple[int, ...]) -> Image.Image:
    """Pad to a square, then resize."""
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), colour)
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return canvas.resize((side, side), Image.Resampling.BICUBIC)


class InstellaVLImageProcessor(ImageProcessingMixin):
    """Splits images into normalised tiles, as the model's config says."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 336,
        image_aspect_ratio: str = "anyres",
        image_grid_pinpoints: list[list[int]] = PINPOINTS,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @classmethod
    def of(cls, config: InstellaVLConfig) -> InstellaVLImageProcessor:
        """The processor of a model with this config."""
        return cls(
            config.vision_config.image_size,
            config.image_aspect_ratio,
            config.image_grid_pinpoints,
            config.image_mean,
            config.image_std,
        )

    def tiles(self, image: Image.Image) -> torch.Tensor:
        """Tiles [t, 3, P, P] float32 of one image, the base view first."""
        side, image = self.image_size, image.convert("RGB")
        if self.image_aspect_ratio == "square":
            views = [_centre(image, side)]
        elif self.image_aspect_ratio == "pad":
            views = [_pad(image, side, tuple(int(mean * 255) for mean in self.image_mean))]
        else:
            target = select_grid(image.size, self.image_grid_pinpoints)
            canvas = _fit(image, target)
            corners = [(left, top) for top in range(0, target[1], side) for left in range(0, target[0], side)]
            views = [image.resize((side, side), Image.Resampling.BICUBIC)]
            views += [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        pixels = np.stack([np.asarray(view, dtype=np.float32) for view in views])
        mean, std = (np.asarray(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        normalised = (pixels / np.float32(255) - mean) / std
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Tiles of one image or of several.

        Returns:
            pixel_values: [n, t, 3, P, P] float32; t is the largest number of tiles, others are padded with zeros.
            image_sizes: n times (width, height), from which the model knows the number of tiles.

        Raises:
            TypeError: an image is not a PIL image.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        strange = [type(image).__name__ for image in images if not isinstance(image, Image.Image)]
        if strange:
            raise TypeError(f"images must be PIL images, not {', '.join(strange)}: open files with PIL.Image.open")
        sizes = [image.size for image in images]
        no_tiles = torch.zeros(0, 1, 3, self.image_size, self.image_size)
        pixels = stack_tiles([self.tiles(image) for image in images]) if images else no_tiles
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes})

    __call__ = preprocess


def stack_tiles(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tiles of several images, each [t, 3, P, P], as one tensor, padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True)
