"""Our tiles and token counts against transformers' LlavaNext processor, at the published sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from checkpoint_convert.llava_next import write_companions
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.merge import num_image_tokens
from megatron_vlm.data.tiling import image_to_tiles
from megatron_vlm.data.tokenizer import load_tokenizer
from tests.checkpoint_convert.whole_model import picture
from tests.random_models import write_tokenizer

# (width, height) -> positions, base view included: the published system's own counts
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
    (1, 1): None,
    (7, 501): None,
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, words = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("words")
    model = ModelConfig(image_token_index=write_tokenizer(words))
    write_companions(folder, model, load_tokenizer(words), torch.float32)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("size", "published"), PUBLISHED.items(), ids=str)
def test_number_of_positions(processor: Any, size: tuple[int, int], published: int | None) -> None:
    ours = num_image_tokens(size, ModelConfig(), "anyres")
    width, height = size
    (theirs,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    assert ours == theirs
    assert published in (None, ours)


@pytest.mark.parametrize("size", [(336, 336), (200, 150), (640, 481), (333, 1000), (1920, 1080), (501, 7)], ids=str)
def test_tiles(processor: Any, size: tuple[int, int]) -> None:
    image = picture(size)
    (theirs,) = processor.image_processor(image, return_tensors="np")["pixel_values"]
    ours = image_to_tiles(image, ModelConfig(), "anyres")
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() < 1e-3


def test_order_of_equal_resolutions_is_kept(processor: Any) -> None:
    """Whichever of two equally good resolutions comes first is taken, on both sides."""
    generator = np.random.default_rng(0)
    for size in generator.integers(1, 2000, (300, 2)).tolist():
        (theirs,) = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])]).num_image_tokens
        assert num_image_tokens(tuple(size), ModelConfig(), "anyres") == theirs, size
