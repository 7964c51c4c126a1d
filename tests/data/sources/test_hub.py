"""Datasets of the hub: what is asked of huggingface_hub, and errors. The hub itself is replaced by a folder."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.annotation_finder import find_annotations
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sources.mixture_file import read_mixture
from megatron_vlm.data.sources.open_source import open_source
from tests.data.helpers import Folder, mixed_folder
from tests.data.sources.packed_files import write_parquet
from tests.data.sources.same_samples import assert_same_samples


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A dataset with a training and a test split, a card, and the annotations that it was made from."""
    folder, published = mixed_folder(tmp_path, 8), tmp_path / "published"
    (published / "data").mkdir(parents=True)
    write_parquet(folder, published / "data" / "train-00000-of-00002.parquet", rows=slice(5))
    write_parquet(folder, published / "data" / "train-00001-of-00002.parquet", rows=slice(5, None))
    write_parquet(folder, published / "data" / "test-00000-of-00001.parquet", rows=slice(2))
    (published / "README.md").write_text("a card")
    shutil.copy(folder.write(), published / "train.json")

    def snapshot_download(repo_id: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        if repo_id != "org/name.v1":
            raise OSError("404 Client Error.\nRepository Not Found")  # as huggingface_hub's own errors are
        assert repo_type == "dataset" and revision in (None, "abc")
        target = tmp_path / "hub" / (revision or "main")
        for file in published.rglob("*"):
            name = str(file.relative_to(published))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


def test_files_and_patterns_of_a_dataset(tmp_path: Path, hub: Folder) -> None:
    plain = open_source(hub.write(), hub.images)
    url = "hf://datasets/org/name.v1"
    assert_same_samples(open_source(f"{url}@abc/data/train-*.parquet", None), plain)
    assert not (tmp_path / "hub/abc/data/test-00000-of-00001.parquet").exists(), "only what is named is downloaded"
    assert_same_samples(open_source(f"{url}/train.json", hub.images), plain)
    assert len(open_source(f"{url}/data/test-00000-of-00001.parquet", None)) == 2
    assert prepare_shards([f"{url}/data/train-*.parquet"], None, tmp_path / "shards", processes=1).written == 8
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"datasets:\n- path: {url}/data\n")
    assert read_mixture(mixture, "/root")[0][0] == f"{url}/data"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"holds the splits test and train\. Give one"),
        ("/data", r"holds the splits test and train\. Give one of them, such as .*test\*\.parquet"),
        ("/gone.json", r"name\.v1/gone\.json does not exist: the dataset has no file"),
        ("/data/gone-*.parquet", r"no file matches .*gone-\*\.parquet"),
    ],
)
def test_what_a_dataset_does_not_have(hub: Folder, path: str, message: str) -> None:
    url = f"hf://datasets/org/name.v1{path}"
    with pytest.raises(DataError, match=message):
        open_source(url, None)
    with pytest.raises(DataError, match=message):
        find_annotations([url])


def test_urls_that_cannot_be_read(hub: Folder) -> None:
    with pytest.raises(
        DataError, match=r"hf://datasets/org/other cannot be downloaded: 404.*Not Found\. Check the name"
    ):
        open_source("hf://datasets/org/other", None)
    with pytest.raises(DataError, match=r"hf://org/name is no dataset of the hub: expected hf://datasets/ORG/NAME"):
        open_source("hf://org/name", None)
    with pytest.raises(DataError, match=r"gs://bucket/a cannot be read: of URLs, only s3:// and hf:// are"):
        open_source("gs://bucket/a", None)
