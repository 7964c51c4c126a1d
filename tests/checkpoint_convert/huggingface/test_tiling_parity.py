"""Our tiles and token counts against transformers' LlavaNext processor on its PIL backend, at the published sizes.

test_stock_versions.py compares the same table under two versions of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.huggingface.llava_next import write_configs
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, image_to_tiles
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.huggingface.stock import pil_processor, tiles_and_image_tokens
from tests.checkpoint_convert.whole_model import picture

# (width, height) -> image tokens, base view included, as the published model counts them
PUBLISHED = {
    (336, 336): 1176,
    (200, 150): None,
    (336, 672): 1776,
    (672, 336): 1752,
    (672, 672): 2928,
    (336, 1008): 2376,
    (1008, 336): 2328,
    (336, 1344): 2976,
    (1344, 336): 2904,
    (336, 1680): 3576,
    (1680, 336): 3480,
    (640, 480): 2340,
    (480, 640): 2352,
    (1024, 768): 2340,
    (1920, 1080): 1948,
    (2480, 3508): 2256,
    (5000, 336): 1544,
    (640, 481): None,
    (333, 1000): None,
    (501, 7): None,
    (7, 501): None,
}


def write_processor(folder: Path, pinpoints: list[list[int]] | None = None) -> ModelConfig:
    """An exported processor in `folder`, by default with the published resolutions; returns the model it is for."""
    vocab_size = write_tokenizer(folder / "tokenizer")
    model = ModelConfig(image_token_index=vocab_size)
    model.image_grid_pinpoints = pinpoints or model.image_grid_pinpoints
    write_configs(folder, model, load_tokenizer(folder / "tokenizer"), torch.float32)
    return model


def assert_same(image: Image.Image, model: ModelConfig, tiles: np.ndarray, image_tokens: int) -> None:
    """Assert that transformers' tiles and number of image tokens equal ours."""
    ours = image_to_tiles(image, model, "anyres")
    assert ours.shape == tiles.shape
    assert np.abs(ours - tiles).max() < 1e-3
    assert num_image_tokens(image.size, ImageGeometry.of(model, "anyres")) == image_tokens
    assert PUBLISHED.get(image.size) in (None, image_tokens)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported")
    write_processor(folder)
    return pil_processor(folder)


@pytest.mark.parametrize("size", PUBLISHED, ids=str)
def test_tiles_and_image_tokens(processor: Any, size: tuple[int, int]) -> None:
    image = picture(size)
    assert_same(image, ModelConfig(), *tiles_and_image_tokens(processor, image))


def test_a_single_pixel(processor: Any) -> None:
    """transformers 4.57 takes its rows for colour channels; 5 does not."""
    image = picture((1, 1))
    assert_same(image, ModelConfig(), *tiles_and_image_tokens(processor, image))


def test_random_sizes(processor: Any) -> None:
    generator = np.random.default_rng(0)
    for size in generator.integers(1, 2000, (300, 2)).tolist():
        (theirs,) = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])]).num_image_tokens
        assert num_image_tokens(tuple(size), ImageGeometry.of(ModelConfig(), "anyres")) == theirs, size


@pytest.mark.parametrize("pinpoints", [[[672, 336], [336, 672]], [[336, 672], [672, 336]]], ids=["wide", "tall"])
def test_first_of_equal_resolutions_is_chosen(tmp_path: Path, pinpoints: list[list[int]]) -> None:
    """A square image fits a wide and a tall resolution equally well; the published ones have no such tie."""
    image, model = picture((500, 500)), write_processor(tmp_path, pinpoints)
    tiles, image_tokens = tiles_and_image_tokens(pil_processor(tmp_path), image)
    assert_same(image, model, tiles, image_tokens)
    assert image_tokens == 576 + 24 * (24 + 1), "padding gives no tokens"
    black = (0 - model.vision.image_mean[0]) / model.vision.image_std[0]
    has_black_columns = bool(np.isclose(tiles[1, 0, :, 0], black).all())
    assert has_black_columns == (pinpoints[0] == [672, 336])
