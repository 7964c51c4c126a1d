"""Images of a sample with several are one padded tile each, as published; single images are tiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.dataset import open_dataset
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.processing.image_tokens import NEWLINE, feature_order, num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles, num_image_tiles
from tests.data.helpers import Folder, make_recipe, tiny_tokenizer_folder


def test_fourteen_photos_fit_into_a_row() -> None:
    size, model = (1024, 768), ModelConfig()
    geometry = ImageGeometry.of(model, "anyres", "pad").for_sample(14)
    assert (num_image_tokens(size, geometry), num_image_tiles(size, geometry)) == (577, 1)
    order = feature_order(size, geometry)
    assert order.tolist() == [*range(576), NEWLINE]
    tiled = ImageGeometry.of(model, "anyres", "same")
    assert tiled.for_sample(14) == tiled and 14 * num_image_tiles(size, tiled) > 64
    assert ImageGeometry.of(model, "anyres", "pad").for_sample(1).tiled
    square = ImageGeometry.of(model, "square", "pad").for_sample(14)
    assert num_image_tokens(size, square) == 576


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    images = [folder.image(f"{i}.png", 20 + i, 9, seed=i) for i in range(3)]
    folder.add("one", "<image>\nWhat?", "One.", image=images[0])
    folder.add("three", "<image>\nFirst?", "Yes.", "<image>\nSecond?", "Yes.", "<image>\nThird?", "No.", image=images)
    tiny_tokenizer_folder(tmp_path / "tokenizer")
    folder.write()
    return folder


@pytest.mark.parametrize(("seq_length", "kept"), [(192, 3), (70, 2)])
def test_rows_of_samples_with_several_images(folder: Folder, seq_length: int, kept: int) -> None:
    recipe = make_recipe(
        folder.root / "train.json", folder.images, folder.root / "tokenizer", seq_length=seq_length,
        oversized_samples="truncate",
    )  # fmt: skip
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    geometry = ImageGeometry.of(recipe.model, "anyres", "pad").for_sample(3)
    seen = set()
    for _ in range(loader.plan.rows):
        batch = next(loader)
        if batch.sample_ids == ["three"] or "three" in batch.sample_ids:
            number = batch.sample_ids.index("three")
            start, stop = batch.cu_seqlens[number : number + 2]
            inside = (batch.feature_positions >= start) & (batch.feature_positions < stop)
            sources = batch.feature_sources[inside]
            first = int(sources[0]) // 4
            wanted = [[*range(4 * tile, 4 * tile + 4), NEWLINE] for tile in range(first, first + kept)]
            assert sources.tolist() == np.concatenate(wanted).tolist()
            images = [Image.open(folder.images / f"{i}.png") for i in range(kept)]
            tiles = np.concatenate([extract_tiles(image, geometry) for image in images])
            assert batch.tiles is not None
            assert torch.equal(batch.tiles[first : first + kept], torch.from_numpy(tiles))
        seen.update(batch.sample_ids)
    assert "three" in seen


def test_a_sample_may_not_be_longer_than_the_context(folder: Folder) -> None:
    """Rows may: positions restart in each sample."""
    recipe = make_recipe(folder.root / "train.json", folder.images, folder.root / "tokenizer", oversized_samples="skip")
    recipe.model.language.max_position_embeddings = 60
    dataset = open_dataset(recipe, is_logging_rank=False)
    assert dataset.usable.tolist() == [True, False] and dataset.tokens[0] <= 60 < dataset.tokens[1]
    recipe.data.oversized_samples = "truncate"
    dataset = open_dataset(recipe, is_logging_rank=False)
    assert dataset.usable.all() and dataset.tokens.max() <= 60
