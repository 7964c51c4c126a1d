"""Annotation files and shards yield the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sources.open_source import open_source
from megatron_vlm.data.sources.sample_source import AnnotationSource, ShardSource, SourceList
from tests.data.helpers import Folder, mixed_folder


def test_shards_yield_the_samples_of_the_annotations(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 12)
    plain = open_source(folder.write(), folder.images)
    prepare_shards([folder.write()], folder.images, tmp_path / "s", processes=1)
    shards = open_source(tmp_path / "s", None)
    assert isinstance(plain, AnnotationSource) and isinstance(shards, ShardSource)
    assert len(plain) == len(shards) == 12
    for index in range(12):
        a, b = plain.sample(index), shards.sample(index)
        assert (a.id, a.turns, a.measure_images()) == (b.id, b.turns, b.measure_images())
        for i in range(len(a.image_names)):
            assert a.read_image(i) == b.read_image(i)


def test_errors_name_the_sample_and_the_image(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add("gone", "<image>", "yes", image="gone.png")
    folder.add("broken", "<image>", "yes", image="broken.png")
    (folder.images / "broken.png").write_bytes(b"nonsense")
    source = AnnotationSource(folder.write(), folder.images)
    for index, (name, reason) in enumerate([("gone", "missing image"), ("broken", "unreadable image")]):
        with pytest.raises(SampleError, match=f"{name}.*{name}.png") as caught:
            source.sample(index).measure_images()
        assert caught.value.reason == reason


def test_content_hash_changes_with_the_file(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 2)
    before = AnnotationSource(folder.write(), folder.images).content_hash()
    assert AnnotationSource(folder.write(), folder.images).content_hash() == before
    folder.entries[0]["conversations"][1]["value"] = "changed"
    assert AnnotationSource(folder.write(), folder.images).content_hash() != before


def test_global_sample_numbers(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 3)
    source = AnnotationSource(folder.write(), folder.images)
    sources = SourceList([source, source])
    assert [sources.locate(n) for n in (0, 2, 3, 5)] == [(0, 0), (0, 2), (1, 0), (1, 2)]


def test_missing_image_folder(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 1)
    with pytest.raises(DataError, match="image_folder .* does not exist"):
        AnnotationSource(folder.write(), tmp_path / "absent")
