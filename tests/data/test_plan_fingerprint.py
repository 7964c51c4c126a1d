"""plan_inputs covers everything that changes the order of rows, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.plan_fingerprint import describe_changes
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from tests.data.helpers import Folder, make_recipe, mixed_folder, tiny_tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = mixed_folder(tmp_path_factory.mktemp("data"), 40)
    folder.write()
    return folder


def load(path: Path | list[str], folder: Folder, tokenizer: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    recipe = make_recipe(path, folder.images, tokenizer, **settings)
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)
    return json.loads(json.dumps(loader.plan_inputs)), loader.source_names


@pytest.fixture
def changes(folder: Folder, tokenizer: Path) -> Callable[..., list[str]]:
    """Reported changes when a run with other data or settings resumes one with the default data and settings."""

    def between(path: Path | list[str] | None = None, **settings: Any) -> list[str]:
        before, _ = load(folder.root / "train.json", folder, tokenizer)
        now, names = load(path or folder.root / "train.json", folder, tokenizer, **settings)
        return describe_changes(now, before, names)

    return between


def test_settings_that_only_distribute_rows_do_not_count(changes: Callable[..., list[str]]) -> None:
    assert changes(global_batch_size=8, num_workers=1) == []


def test_data_may_be_moved(folder: Folder, tmp_path: Path, changes: Callable[..., list[str]]) -> None:
    moved = shutil.copytree(folder.root, tmp_path / "elsewhere")
    assert changes(moved / "train.json") == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seed": 43}, "training.seed is 43 (was 7)"),
        ({"packing_window": 30}, "data.packing_window is 30 (was 50000)"),
        ({"seq_length": 200}, "data.seq_length is 200 (was 192)"),
        ({"max_tiles_per_row": 12}, "data.max_tiles_per_row is 12 (was 16)"),
        ({"cost_per_tile": 1.0}, "data.cost_per_tile is 1.0 (was "),
        ({"image_aspect_ratio": "pad"}, "train.json is 40 samples, 40 usable, of lengths"),
    ],
)
def test_settings_that_count(changes: Callable[..., list[str]], settings: dict[str, Any], expected: str) -> None:
    [change] = changes(**settings)
    assert expected in change


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda entries: entries.pop(7), "train.json is 39 samples, 39 usable,"),
        (lambda entries: entries.reverse(), "train.json is 40 samples, 40 usable, of lengths"),
        (lambda entries: entries[3]["conversations"].pop(), "train.json is 40 samples, 39 usable, of lengths"),
    ],
    ids=["one_less", "reordered", "one_rejected"],
)
def test_data_that_changed(
    folder: Folder, tmp_path: Path, changes: Callable[..., list[str]], edit: Callable[[list[Any]], Any], expected: str
) -> None:
    entries = json.loads((folder.root / "train.json").read_text())
    edit(entries)
    (tmp_path / "train.json").write_text(json.dumps(entries))
    [change] = changes(tmp_path / "train.json")
    assert f"{tmp_path}/{expected}" in change and "(was 40 samples, 40 usable, of lengths" in change


def test_a_mixture_that_changed(folder: Folder, tmp_path: Path, changes: Callable[..., list[str]]) -> None:
    train, mixture = folder.root / "train.json", tmp_path / "mix.yaml"
    mixture.write_text(f"datasets: [{{json_path: {train}, sampling_strategy: 'repeat:2'}}]")
    assert changes(mixture) == ["mixture entry 0 is data set 0, repeat:2 (was data set 0, all)"]
    mixture.write_text(f"datasets: [{{json_path: {train}}}, {{json_path: {train}}}]")
    assert changes(mixture) == ["the number of mixture entries is 2 (was 1)"]


def test_shards_of_another_size(folder: Folder, tokenizer: Path, tmp_path: Path) -> None:
    """Samples are shuffled within windows of shards, so the shard boundaries change the order too."""
    loaded = []
    for limit in (3000, 3000, 9000):
        output = tmp_path / str(len(loaded))
        prepare_shards([folder.root / "train.json"], folder.images, output, 1, size_limit=limit)
        loaded.append(load(output, folder, tokenizer))
    (first, _), (again, names), (other, _) = loaded
    assert describe_changes(first, again, names) == []
    assert names[0] in describe_changes(other, again, names)[0]
