"""Resolutions, tiles and their pixels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.processing.tiling import (
    CLIP_MEAN,
    CLIP_STD,
    ImageGeometry,
    extract_tiles,
    image_to_tiles,
    normalise_tiles,
    num_image_tiles,
    select_best_resolution,
)
from tests.data.helpers import tiny_model

PINPOINTS = [(w, h) for w, h in ModelConfig().image_grid_pinpoints]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def to_pixels(tile: np.ndarray) -> np.ndarray:
    """[3, P, P] normalised -> [P, P, 3] in 0..255"""
    return (tile.transpose(1, 2, 0) * np.array(CLIP_STD) + np.array(CLIP_MEAN)) * 255


@pytest.mark.parametrize(
    ("size", "resolution"),
    [((100, 100), (336, 336)), ((640, 480), (672, 672)), ((336, 672), (336, 672)), ((672, 336), (672, 336)),
     ((1920, 1080), (672, 672)), ((5000, 336), (1680, 336)), ((300, 2000), (336, 1680)), ((1, 100000), (336, 336))],
)  # fmt: skip
def test_select_best_resolution(size: tuple[int, int], resolution: tuple[int, int]) -> None:
    assert select_best_resolution(size, PINPOINTS) == resolution


def test_select_best_resolution_agrees_with_transformers() -> None:
    from transformers.image_processing_utils import select_best_resolution

    rng = random.Random(0)
    swapped = [(h, w) for w, h in PINPOINTS]
    for _ in range(3000):
        width, height = int(10 ** rng.uniform(0, 4)), int(10 ** rng.uniform(0, 4))
        expected = select_best_resolution((height, width), swapped)
        assert select_best_resolution((width, height), PINPOINTS) == expected[::-1]


def test_tiles_split_the_image_row_by_row() -> None:
    model, image = tiny_model(), picture(16, 16)
    tiles = image_to_tiles(image, model, "anyres")
    assert tiles.shape == (5, 3, 8, 8) and tiles.dtype == np.float32
    pixels = np.asarray(image)
    for tile, (top, left) in zip(tiles[1:], [(0, 0), (0, 8), (8, 0), (8, 8)], strict=True):
        np.testing.assert_allclose(to_pixels(tile), pixels[top : top + 8, left : left + 8], atol=1e-3)
    base = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(to_pixels(tiles[0]), base, atol=1e-3)


def test_normalise_tiles_equals_numpy_bit_for_bit() -> None:
    """For every pixel value in every channel."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    expected = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    normalised = normalise_tiles(torch.from_numpy(pixels), CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(normalised.numpy(), expected)
    assert normalise_tiles(torch.empty(0, 3, 8, 8, dtype=torch.uint8), CLIP_MEAN, CLIP_STD).shape == (0, 3, 8, 8)


def test_images_are_centred_on_black() -> None:
    """14x16 in 16x16 has a black column on each side."""
    tiles = image_to_tiles(picture(14, 16), tiny_model(), "anyres")
    row = np.concatenate([to_pixels(tiles[1]), to_pixels(tiles[2])], axis=1)
    np.testing.assert_allclose(row[:, [0, 15]], 0, atol=1e-3)
    np.testing.assert_allclose(row[:, 1:15], np.asarray(picture(14, 16))[:8], atol=1e-3)


@pytest.mark.parametrize("size", [(5, 9), (30, 7), (7, 30), (17, 16), (1, 40), (3, 3)])
def test_num_image_tiles_and_ranges(size: tuple[int, int]) -> None:
    model = tiny_model()
    geometry, image = ImageGeometry.of(model, "anyres"), picture(*size)
    tiles = extract_tiles(image, geometry)
    assert len(tiles) == num_image_tiles(size, geometry)
    for start in range(len(tiles)):
        for stop in range(start + 1, len(tiles) + 1):
            np.testing.assert_array_equal(extract_tiles(image, geometry, start, stop), tiles[start:stop])


def test_square_crops_the_centre_and_pad_pads() -> None:
    model = tiny_model()
    wide = picture(16, 8)
    square = image_to_tiles(wide, model, "square")
    assert square.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(to_pixels(square[0]), np.asarray(wide)[:, 4:12], atol=1e-3)
    padded = to_pixels(image_to_tiles(Image.new("RGB", (80, 8), (255, 0, 0)), model, "pad")[0])
    np.testing.assert_allclose(padded[0, 0], (122, 116, 104), atol=1e-2)
    assert num_image_tiles((80, 8), ImageGeometry.of(model, "pad")) == 1


@pytest.mark.parametrize("size", [(336, 336), (500, 300), (300, 500), (1000, 200), (64, 64)])
def test_tiles_agree_with_transformers(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    model = ModelConfig()
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[h, w] for w, h in PINPOINTS],
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
    )
    expected = processor(picture(*size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(image_to_tiles(picture(*size), model, "anyres"), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_colour_mode_becomes_rgb(mode: str) -> None:
    assert image_to_tiles(picture(9, 9).convert(mode), tiny_model(), "anyres").shape[1] == 3
