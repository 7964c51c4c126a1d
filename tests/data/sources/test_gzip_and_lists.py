"""Compressed annotation files, and lists in braces, hold the samples of the files they stand for."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_vlm.config.file_lists import expand_braces
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources import gzip_copy
from megatron_vlm.data.sources.annotation_file import AnnotationFile
from megatron_vlm.data.sources.open_source import open_source
from tests.data.helpers import Folder, mixed_folder
from tests.data.sources.same_samples import assert_same_samples


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.ndjson.gz", "a.json_new", "a.json_new.gz"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_samples_of_a_compressed_file(tmp_path: Path, name: str, cached: bool) -> None:
    folder = mixed_folder(tmp_path, 6)
    plain = folder.write(name.removesuffix(".gz"))
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    file = AnnotationFile(tmp_path / name, tmp_path / "cache" if cached else None)
    assert [file.entry(i) for i in range(len(file))] == folder.entries
    assert file.content_hash() == AnnotationFile(plain).content_hash()
    assert_same_samples(open_source(tmp_path / name, folder.images), open_source(plain, folder.images))


def test_a_file_is_decompressed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copies = mixed_folder(tmp_path, 4), []
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(folder.write().read_bytes()))
    original = gzip_copy._decompress
    monkeypatch.setattr(gzip_copy, "_decompress", lambda *args: copies.append(1) or original(*args))
    with ThreadPoolExecutor(4) as threads:  # each opens the lock by itself, as processes do
        files = list(threads.map(lambda _: AnnotationFile(path, tmp_path / "cache"), range(4)))
    assert len(copies) == 1 and all(file.entry(3) == folder.entries[3] for file in files)
    folder.add("more", "hi", "yes")
    path.write_bytes(gzip.compress(folder.write().read_bytes()))
    assert len(AnnotationFile(path, tmp_path / "cache")) == 5 and len(copies) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the old copy is removed"


@pytest.mark.parametrize("cached", [True, False])
def test_files_that_cannot_be_decompressed(tmp_path: Path, cached: bool) -> None:
    folder = mixed_folder(tmp_path, 6)
    whole, path = gzip.compress(folder.write().read_bytes()), tmp_path / "a.json.gz"
    cache = tmp_path / "cache" if cached else None
    for content, message in [
        (whole[:-20], r"a\.json\.gz .*truncated\. Copy it again"),
        (b"[]", r"a\.json\.gz is no whole gzip file"),
        (whole[:40] + bytes(20) + whole[60:], r"a\.json\.gz is no whole gzip file"),
        (gzip.compress(b""), r"a\.json\.gz has no entry"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            AnnotationFile(path, cache)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"decompressed to .*Set cache_dir"):
        AnnotationFile(path, path)
    with pytest.raises(DataError, match=r"b\.json\.gz cannot be read: No such file"):
        AnnotationFile(tmp_path / "b.json.gz", cache)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("a.json", ["a.json"]),
        ("/x/{a,b, c}.json", ["/x/a.json", "/x/b.json", "/x/c.json"]),
        ("a_{8..10}.tar", ["a_8.tar", "a_9.tar", "a_10.tar"]),
        ("a_{08..10}.tar", ["a_08.tar", "a_09.tar", "a_10.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{only}.json", ["{only}.json"]),
    ],
)
def test_lists_in_braces(path: str, expanded: list[str]) -> None:
    assert expand_braces(path) == expanded


@pytest.mark.parametrize("path", ["{3..1}.json", "{0..999999999}.tar", "{0..999}{0..999}.tar"])
def test_lists_that_are_empty_or_too_long(path: str) -> None:
    with pytest.raises(ValueError, match="is empty|stands for"):
        expand_braces(path)
    with pytest.raises(DataError, match="Correct the path"):
        open_source(path, None)


def test_a_list_is_one_source(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 10)
    whole = open_source(folder.write(), folder.images)
    for name, entries in [("p_0.json", folder.entries[:4]), ("p_1.json", folder.entries[4:])]:
        Folder(tmp_path, entries).write(name)
    parts = open_source(tmp_path / "p_{0,1}.json", folder.images)
    assert_same_samples(parts, whole)
    before = parts.content_hash(), parts.quick_hash()
    Folder(tmp_path, folder.entries[5:]).write("p_1.json")
    after = open_source(tmp_path / "p_{0..1}.json", folder.images)
    assert after.content_hash() != before[0] and after.quick_hash() != before[1]
    with pytest.raises(DataError, match=r"p_2\.json does not exist|p_2\.json cannot be read"):
        open_source(tmp_path / "p_{0..2}.json", folder.images)
    assert_same_samples(open_source(tmp_path / "p_*.json", folder.images), after)
    with pytest.raises(DataError, match=r"no file matches .*q_\*\.json\. Correct the path"):
        open_source(tmp_path / "q_*.json", folder.images)
    (tmp_path / "p_{7,8}.json").write_text("[1]")
    assert len(open_source(tmp_path / "p_{7,8}.json", folder.images)) == 1, "the name of a file"
