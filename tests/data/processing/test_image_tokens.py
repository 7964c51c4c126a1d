"""Positions that images fill."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.pinpoints import expand_pinpoints
from megatron_vlm.data.processing.image_tokens import (
    FIRST_BILINEAR,
    NEWLINE,
    RowFeatures,
    feature_order,
    num_image_tokens,
)
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles
from tests.data.helpers import tiny_model

PUBLISHED = {
    (100, 100): 1176, (336, 336): 1176, (336, 672): 1776, (672, 336): 1752, (672, 672): 2928, (336, 1008): 2376,
    (1008, 336): 2328, (336, 1344): 2976, (1344, 336): 2904, (336, 1680): 3576, (1680, 336): 3480, (640, 480): 2340,
    (480, 640): 2352, (1024, 768): 2340, (1920, 1080): 1948, (2480, 3508): 2256, (5000, 336): 1544,
}  # fmt: skip


@pytest.mark.parametrize(("size", "tokens"), PUBLISHED.items())
def test_published_counts(size: tuple[int, int], tokens: int) -> None:
    model = ModelConfig()
    assert num_image_tokens(size, ImageGeometry.of(model, "anyres")) == tokens
    assert len(feature_order(size, ImageGeometry.of(model, "anyres"))) == tokens
    assert (
        num_image_tokens(size, ImageGeometry.of(model, "square"))
        == num_image_tokens(size, ImageGeometry.of(model, "pad"))
        == 576
    )


def test_order_of_a_two_by_two_grid() -> None:
    """Tiles of 2x2 patches: base 0-3, tiles 4-7, 8-11, 12-15, 16-19."""
    assert feature_order((16, 16), ImageGeometry.of(tiny_model(), "anyres")).tolist() == [
        0, 1, 2, 3,
        4, 5, 8, 9, NEWLINE,
        6, 7, 10, 11, NEWLINE,
        12, 13, 16, 17, NEWLINE,
        14, 15, 18, 19, NEWLINE,
    ]  # fmt: skip


def test_padding_is_removed() -> None:
    """24x8 covers its grid. 1200x10 covers less than one row of it: only the base view remains, as in transformers."""
    assert feature_order((24, 8), ImageGeometry.of(tiny_model(), "anyres")).tolist() == [
        0, 1, 2, 3, 4, 5, 8, 9, 12, 13, NEWLINE, 6, 7, 10, 11, 14, 15, NEWLINE,
    ]  # fmt: skip
    assert feature_order((1200, 10), ImageGeometry.of(tiny_model(), "anyres")).tolist() == [0, 1, 2, 3]


def test_square_and_pad_have_the_base_view_only() -> None:
    for mode in ("square", "pad"):
        assert feature_order((30, 9), ImageGeometry.of(tiny_model(), mode)).tolist() == [0, 1, 2, 3]


def test_each_feature_is_used_at_most_once() -> None:
    model, rng = ModelConfig(), random.Random(1)
    for _ in range(300):
        size = (int(10 ** rng.uniform(0, 4)), int(10 ** rng.uniform(0, 4)))
        order = feature_order(size, ImageGeometry.of(model, "anyres"))
        assert len(order) == num_image_tokens(size, ImageGeometry.of(model, "anyres"))
        features = order[order != NEWLINE]
        assert len(np.unique(features)) == len(features)
        assert features.max() < num_image_tiles(size, ImageGeometry.of(model, "anyres")) * 576
        np.testing.assert_array_equal(features[:576], np.arange(576))


def test_counts_agree_with_transformers() -> None:
    """The unpadded grids of transformers, over many sizes."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    model, rng = ModelConfig(), random.Random(2)
    pinpoints = [[h, w] for w, h in model.image_grid_pinpoints]
    for _ in range(300):
        width, height = int(10 ** rng.uniform(1, 4)), int(10 ** rng.uniform(1, 4))
        down, across = get_anyres_image_grid_shape((height, width), pinpoints, 336)
        kept = unpad_image(torch.empty(1, down * 24, across * 24), (height, width))
        expected = 576 + kept.shape[1] * (kept.shape[2] + 1)
        assert num_image_tokens((width, height), ImageGeometry.of(model, "anyres")) == expected, (width, height)


def onevision(size: tuple[int, int], model: ModelConfig, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(features packed by transformers, random features they were packed from)."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=model.vision.image_size, patch_size=model.vision.patch_size),
        image_grid_pinpoints=[[h, w] for w, h in model.image_grid_pinpoints],
    )
    tiles = num_image_tiles(size, ImageGeometry.of(model, "anyres"))
    features = torch.randn(tiles, model.vision.patches_per_tile, 5, generator=torch.Generator().manual_seed(0))
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        torch.tensor([size[::-1]]),
        torch.full((5,), 7.0),
        f"anyres_max_{most}",
    )
    return packed[0], features


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_downsampled_grids_agree_with_transformers(most: int) -> None:
    model, rng = ModelConfig(image_grid_pinpoints=expand_pinpoints("(1x1),...,(6x6)", 336)), random.Random(most)
    geometry = ImageGeometry.of(model, f"anyres_max_{most}")
    downsampled = 0
    for _ in range(30):
        size = (int(10 ** rng.uniform(2.3, 3.5)), int(10 ** rng.uniform(2.3, 3.5)))
        expected, features = onevision(size, model, most)
        row = RowFeatures(geometry)
        row.add((336, 336), 0)  # another image before it
        row.add(size, 5000)
        fields = row.fields()
        positions = fields["feature_positions"]
        of_image = positions >= 5000
        assert int(of_image.sum()) == len(expected) == num_image_tokens(size, geometry)
        other = torch.zeros(2, 576, 5)
        table = torch.cat([torch.cat([other, features]).flatten(0, 1), torch.full((1, 5), 7.0)])
        newline = len(table) - 1
        if "bilinear_sources" in fields:
            downsampled += 1
            bilinear = (table[fields["bilinear_sources"]] * fields["bilinear_weights"][..., None]).sum(1)
            table = torch.cat([table, bilinear])
        sources = fields["feature_sources"][of_image]
        got = table[torch.where(sources < 0, newline - 1 - sources, sources)]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # torch computes positions in fp32
    assert downsampled > 5


def test_bilinear_features_of_several_images() -> None:
    model = tiny_model()
    row = RowFeatures(ImageGeometry.of(model, "anyres_max_1"))
    for start in (0, 100):
        row.add((16, 16), start)
    fields = row.fields()
    assert row.num_tiles == 10 and (fields["bilinear_weights"].sum(1) == 1).all()
    bilinear = fields["feature_sources"][fields["feature_sources"] <= FIRST_BILINEAR]
    assert bilinear.tolist() == [FIRST_BILINEAR - b for b in range(len(fields["bilinear_sources"]))]
    half = len(bilinear) // 2
    assert fields["bilinear_sources"][:half].max() < 20 <= fields["bilinear_sources"][half:].min()
    assert (fields["bilinear_sources"][half:] == fields["bilinear_sources"][:half] + 20).all()
