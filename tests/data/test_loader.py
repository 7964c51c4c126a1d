"""From files to batches: the same rows for any number of ranks and workers, and errors that name the sample."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.data.errors import DataError, RowError
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.processing import image_io as images
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles, num_image_tiles
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.rows import row_builder
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch, tile_range
from tests.data.helpers import Folder, image_bytes, make_recipe, mixed_folder, tiny_sentencepiece, tiny_tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = mixed_folder(tmp_path_factory.mktemp("data"), 40)
    folder.write()
    return folder


def loader(recipe: Any, rank: int = 0, size: int = 1, consumed: int = 0, **kwargs: Any) -> RowLoader:
    arguments = {"need_tiles": True, "tile_rank": 0, "tile_ranks": 1, **kwargs}
    return build_loader(recipe, dp_rank=rank, dp_size=size, consumed_rows=consumed, **arguments)


def recipe_for(folder: Folder, tokenizer: Path, **settings: Any) -> Any:
    """All images are tiled, also those of samples with several."""
    settings = {"multi_image_aspect_ratio": "same", **settings}
    return make_recipe(folder.root / "train.json", folder.images, tokenizer, **settings)


def take(rows: RowLoader, count: int) -> list[PackedBatch]:
    batches = [next(rows) for _ in range(count)]
    rows.close()
    return batches


def assert_same(a: PackedBatch, b: PackedBatch) -> None:
    for name in ("tokens", "labels", "positions", "feature_positions", "feature_sources", "tiles"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name
    assert (a.cu_seqlens, a.num_tiles, a.sample_ids, a.num_tokens) == (
        b.cu_seqlens,
        b.num_tiles,
        b.sample_ids,
        b.num_tokens,
    )


def test_an_epoch_has_every_sample_once(folder: Folder, tokenizer: Path) -> None:
    rows = loader(recipe_for(folder, tokenizer))
    epoch = take(rows, rows.summary()["rows_per_epoch"])
    assert Counter(name for batch in epoch for name in batch.sample_ids) == Counter(f"s{i}" for i in range(40))
    assert rows.summary()["samples"] == rows.summary()["usable"] == 40


def test_batches_hold_the_content_of_their_samples(folder: Folder, tokenizer: Path) -> None:
    recipe = recipe_for(folder, tokenizer)
    text, geometry = load_tokenizer(tokenizer), ImageGeometry.of(recipe.model, "anyres")
    no_tiles = np.empty((0, 3, 8, 8), np.uint8)
    for batch in take(loader(recipe), 8):
        assert batch.tokens.shape == (192,) and batch.tiles is not None and len(batch.tiles) == batch.num_tiles
        image_tokens = batch.tokens == recipe.model.image_token_index
        assert torch.equal(batch.feature_positions, torch.nonzero(image_tokens)[:, 0])
        supervised = batch.labels != IGNORE_INDEX
        assert torch.equal(batch.labels[supervised], batch.tokens.roll(-1)[supervised])
        assert not (batch.labels == recipe.model.image_token_index).any()
        expected_tiles = []
        for name, start, stop in zip(batch.sample_ids, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            entry = folder.entries[int(name[1:])]
            labels = batch.labels[start:stop]
            answers = [m["value"] for m in entry["conversations"] if m["from"] == "gpt"]
            assert text.decode(labels[labels != IGNORE_INDEX].tolist()) == "\n".join([*answers, ""])
            paths = entry.get("image", [])
            for path in [paths] if isinstance(paths, str) else paths:
                expected_tiles.append(extract_tiles(Image.open(folder.images / path), geometry))
        np.testing.assert_array_equal(batch.tiles, np.concatenate([no_tiles, *expected_tiles]))


def test_ranks_read_the_rows_of_one_process(folder: Folder, tokenizer: Path) -> None:
    recipe = recipe_for(folder, tokenizer)
    reference = take(loader(recipe), 48)
    for size in (2, 4):
        shares = [take(loader(recipe, rank, size), 48 // size) for rank in range(size)]
        for number, batch in enumerate(reference):
            assert_same(batch, shares[number % size][number // size])
    ids = [batch.sample_ids for batch in reference]
    assert ids[:20] != ids[20:40]  # the order differs between epochs


def test_workers_build_the_same_rows(folder: Folder, tokenizer: Path) -> None:
    inline = take(loader(recipe_for(folder, tokenizer)), 30)
    for workers in (1, 2):
        rows = loader(recipe_for(folder, tokenizer, num_workers=workers))
        for a, b in zip(inline, take(rows, 30), strict=True):
            assert_same(a, b)
        assert rows.data_wait_seconds > 0


@pytest.mark.parametrize("consumed", [4, 20, 44])
def test_resuming_with_another_number_of_ranks(folder: Folder, tokenizer: Path, consumed: int) -> None:
    recipe = recipe_for(folder, tokenizer)
    reference = take(loader(recipe), 60)[consumed:]
    for size in (1, 2, 4):
        shares = [take(loader(recipe, rank, size, consumed), 12 // size) for rank in range(size)]
        for number in range(12):
            assert_same(reference[number], shares[number % size][number // size])


def test_the_seed_determines_the_order(folder: Folder, tokenizer: Path) -> None:
    ids = [[b.sample_ids for b in take(loader(recipe_for(folder, tokenizer, seed=seed)), 5)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("size", [2, 3, 20])
def test_tiles_are_sharded_over_the_encoding_ranks(folder: Folder, tokenizer: Path, size: int) -> None:
    recipe = recipe_for(folder, tokenizer)
    whole = take(loader(recipe), 4)
    for rank in range(size):
        for batch, shard in zip(whole, take(loader(recipe, tile_rank=rank, tile_ranks=size), 4), strict=True):
            assert batch.tiles is not None and shard.tiles is not None
            start, stop = tile_range(batch.num_tiles, rank, size)
            assert torch.equal(shard.tiles, batch.tiles[start:stop]) and shard.tiles.shape[1:] == (3, 8, 8)
            assert torch.equal(shard.feature_sources, batch.feature_sources)


def test_an_image_is_decoded_once_by_each_rank_that_needs_it(
    folder: Folder, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that share the tiles of an image both decode it; other ranks do not."""
    decoded: list[int] = []
    monkeypatch.setattr(row_builder, "decode_image", lambda data: decoded.append(0) or images.decode_image(data))
    recipe = recipe_for(folder, tokenizer)
    whole = take(loader(recipe), 10)
    image_of_tile = [_image_of_tile(batch, folder, recipe) for batch in whole]
    assert len(decoded) == sum(len(set(indices)) for indices in image_of_tile) > 10
    for size in (2, 3):
        for rank in range(size):
            decoded.clear()
            take(loader(recipe, tile_rank=rank, tile_ranks=size), 10)
            needed = [set(indices[slice(*tile_range(len(indices), rank, size))]) for indices in image_of_tile]
            assert len(decoded) == sum(map(len, needed))
    decoded.clear()
    take(loader(recipe, need_tiles=False), 10)
    assert not decoded


def _image_of_tile(batch: PackedBatch, folder: Folder, recipe: Any) -> list[int]:
    """For each tile of a row, the index of its image in the row; from the sizes of the image files."""
    geometry, counts = ImageGeometry.of(recipe.model, "anyres"), []
    for name in batch.sample_ids:
        paths = folder.entries[int(name[1:])].get("image", [])
        for path in [paths] if isinstance(paths, str) else paths:
            counts.append(num_image_tiles(Image.open(folder.images / path).size, geometry))
    return [image for image, count in enumerate(counts) for _ in range(count)]


def test_a_rank_without_tiles_reads_no_image(tmp_path: Path, tokenizer: Path) -> None:
    folder = mixed_folder(tmp_path, 12)
    folder.write()
    recipe = recipe_for(folder, tokenizer)
    whole = take(loader(recipe), 4)
    for image in folder.images.iterdir():
        image.unlink()
    for batch, without in zip(whole, take(loader(recipe, need_tiles=False), 4), strict=True):
        assert without.tiles is None
        batch.tiles = None
        assert_same(batch, without)


def test_shards_give_the_same_batches_as_their_annotations(folder: Folder, tokenizer: Path, tmp_path: Path) -> None:
    prepare_shards([folder.root / "train.json"], folder.images, tmp_path / "s", processes=1, size_limit=20000)
    plain = take(loader(recipe_for(folder, tokenizer)), 12)
    for workers in (0, 2):
        recipe = make_recipe(tmp_path / "s", None, tokenizer, num_workers=workers, multi_image_aspect_ratio="same")
        for a, b in zip(plain, take(loader(recipe), 12), strict=True):
            assert_same(a, b)


def test_a_mixture_with_a_sentencepiece_tokenizer(folder: Folder, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"datasets: [{{json_path: {folder.root / 'train.json'}, choose: 6}}]")
    model = tiny_sentencepiece(tmp_path / "t.model")
    rows = loader(make_recipe(mix, folder.images, model, image_aspect_ratio="pad", seq_length=512))
    first = [name for batch in take(rows, rows.summary()["rows_per_epoch"]) for name in batch.sample_ids]
    assert len(set(first)) == 6


def test_text_only_rows(tmp_path: Path, tokenizer: Path) -> None:
    folder = Folder(tmp_path)
    for i in range(8):
        folder.add(f"t{i}", "hi " * i, "yes")
    folder.write()
    for batch in take(loader(make_recipe(tmp_path / "train.json", None, tokenizer)), 2):
        assert batch.tiles is not None and batch.tiles.shape == (0, 3, 8, 8) and batch.num_tiles == 0


def test_invalid_samples_are_counted_and_not_used(tmp_path: Path, tokenizer: Path) -> None:
    folder = mixed_folder(tmp_path, 8)
    folder.add("empty", "hi", "")
    folder.add("robot", "hi", "yes")
    folder.entries[-1]["conversations"][1]["from"] = "robot"
    folder.add("count", "<image><image>", "yes", image=folder.image("x.png", 9, 9))
    folder.add("gone", "<image>", "yes", image="gone.png")
    folder.add("broken", "<image>", "yes", image="broken.png")
    (folder.images / "broken.png").write_bytes(image_bytes(30, 30)[:200])
    folder.write()
    rows = loader(recipe_for(folder, tokenizer))
    summary = rows.summary()
    assert (summary["samples"], summary["usable"], summary["skipped"]) == (13, 8, 0)
    assert summary["rejected"] == {
        "empty answer": 1, "unknown role": 1, "image count mismatch": 1, "missing image": 1, "unreadable image": 1,
    }  # fmt: skip
    read = {name for batch in take(rows, summary["rows_per_epoch"]) for name in batch.sample_ids}
    assert read == {f"s{i}" for i in range(8)}


def test_samples_longer_than_a_row(tmp_path: Path, tokenizer: Path) -> None:
    folder = mixed_folder(tmp_path, 8)
    folder.add("long", "hi " * 400, "yes")
    folder.write()
    with pytest.raises(DataError, match=r"1 samples are longer than a row of 192 tokens.*'long' of .*train\.json"):
        loader(recipe_for(folder, tokenizer))
    rows = loader(recipe_for(folder, tokenizer, oversized_samples="skip"))
    assert (rows.summary()["skipped"], rows.summary()["usable"]) == (1, 8)
    with pytest.raises(DataError, match="4096 tokens and 3 tiles: 's0' .* 5 tiles"):
        loader(recipe_for(folder, tokenizer, max_tiles_per_row=3, seq_length=4096))


def test_no_usable_sample(tmp_path: Path, tokenizer: Path) -> None:
    folder = Folder(tmp_path)
    folder.add("empty", "hi", "")
    folder.write()
    with pytest.raises(DataError, match=r"dataset is empty: none of 1 samples .* \(empty answer 1; 0 longer"):
        loader(recipe_for(folder, tokenizer))


def test_a_tokenizer_that_uses_the_image_token_index(folder: Folder, tokenizer: Path) -> None:
    recipe = recipe_for(folder, tokenizer)
    recipe.model.image_token_index = 100
    with pytest.raises(DataError, match="image_token_index is 100"):
        loader(recipe)


def test_a_batch_size_that_the_ranks_do_not_divide(folder: Folder, tokenizer: Path) -> None:
    with pytest.raises(DataError, match="global_batch_size 4 is not a multiple of the data-parallel size 3"):
        loader(recipe_for(folder, tokenizer), 0, 3)


def test_a_killed_worker_ends_the_run(folder: Folder, tokenizer: Path) -> None:
    rows = loader(recipe_for(folder, tokenizer, num_workers=2))
    next(rows)
    os.kill(rows.worker_pids[0], signal.SIGKILL)
    with pytest.raises(RowError, match=r"no worker returned row \d+: .* The row holds sample \d+ of .*train\.json"):
        take(rows, 40)


def test_a_batch_that_cannot_be_sent_ends_the_run(
    folder: Folder, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For example when the temporary folder is cleaned, where multiprocessing keeps its sockets."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(tmp_path / "gone"))  # type: ignore[attr-defined]
    rows = loader(recipe_for(folder, tokenizer, num_workers=1))
    with pytest.raises(RowError, match=r"row \d+ cannot be built: FileNotFoundError"):
        take(rows, 10)


def test_an_error_in_a_worker_names_the_sample(tmp_path: Path, tokenizer: Path) -> None:
    folder = mixed_folder(tmp_path, 12)
    folder.write()
    for workers in (0, 2):
        rows = loader(recipe_for(folder, tokenizer, num_workers=workers))
        image = (folder.images / "5_0.png").read_bytes()
        (folder.images / "5_0.png").unlink()
        with pytest.raises(RowError, match=r"row \d+: sample 's5' of .*train\.json: image .*5_0\.png"):
            take(rows, 40)
        (folder.images / "5_0.png").write_bytes(image)


def test_one_process_logs_rejected_samples(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path, 8)
    folder.add("empty", "hi", "")
    folder.write()
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("megatron_vlm.data.dataset"), "warning", lambda *args: lines.append(args[1]))
    recipe = recipe_for(folder, tokenizer)
    for rank, tile_rank, need_tiles in [(1, 0, True), (0, 1, True), (0, 0, False)]:
        loader(recipe, rank, 2, tile_rank=tile_rank, tile_ranks=2, need_tiles=need_tiles)
        assert not lines
    loader(recipe, 0, 2)
    assert "1 of 9 samples rejected: empty answer 1" in lines[0]
