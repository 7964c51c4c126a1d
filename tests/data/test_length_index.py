"""Lengths are those of the encoded samples, cached, and measured again when something changes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data import length_index as lengths
from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.length_index import REJECTED, LengthIndex, describe_rejections, load_length_index
from megatron_vlm.data.processing.conversation import encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.sources.sample_source import AnnotationSource
from tests.data.helpers import Folder, image_bytes, mixed_folder, tiny_model, tiny_tokenizer_folder

GEOMETRY = ImageGeometry.of(tiny_model(), "anyres")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder(tmp_path / "tokenizer"))


def build(folder: Folder, tokenizer: Tokenizer, **kwargs: object) -> LengthIndex:
    return load_length_index(AnnotationSource(folder.write(), folder.images), tokenizer, GEOMETRY, **kwargs)  # type: ignore


def same(a: LengthIndex, b: LengthIndex) -> bool:
    arrays = ("tokens", "tiles", "size_starts", "sizes")
    return a.rejected == b.rejected and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


def test_lengths_are_those_of_the_encoded_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = mixed_folder(tmp_path, 12)
    index = build(folder, tokenizer)
    source = AnnotationSource(folder.write(), folder.images)
    for i in range(12):
        sample = source.sample(i)
        sizes = sample.measure_images()
        image_lengths = [num_image_tokens(size, GEOMETRY) for size in sizes]
        assert index.image_sizes(i) == sizes
        assert index.tokens[i] == len(encode_conversation(sample.turns, tokenizer, image_lengths, 500).ids)
        assert index.tiles[i] == sum(num_image_tiles(size, GEOMETRY) for size in sizes)


def test_cached_and_measured_again_after_a_change(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixed_folder(tmp_path, 4)
    first = build(folder, tokenizer)
    measured = []
    original = lengths.parallel_map
    monkeypatch.setattr(lengths, "parallel_map", lambda *args, **kw: measured.append(1) or original(*args, **kw))
    assert same(build(folder, tokenizer), first) and not measured
    folder.entries[3]["conversations"][1]["value"] = "a longer answer"
    assert build(folder, tokenizer).tokens[3] > first.tokens[3] and len(measured) == 1
    source = AnnotationSource(folder.write(), folder.images)
    load_length_index(source, tokenizer, replace(GEOMETRY, aspect_ratio="pad"))
    assert len(measured) == 2
    tokenizer.fingerprint = "another"
    load_length_index(source, tokenizer, GEOMETRY)
    assert len(measured) == 3


def test_several_processes_measure_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = mixed_folder(tmp_path, 8)
    folder.entries *= 80
    assert same(
        build(folder, tokenizer, processes=1, cache_dir=tmp_path / "one"),
        build(folder, tokenizer, processes=2, cache_dir=tmp_path / "two"),
    )


def test_several_processes_build_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = mixed_folder(tmp_path, 8)
    source = AnnotationSource(folder.write(), folder.images)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: load_length_index(source, tokenizer, GEOMETRY, tmp_path / "c", 1), range(4)))
    assert all(same(index, built[0]) for index in built)
    assert len(list((tmp_path / "c").iterdir())) == 2  # the index and the list of rejected samples; no partial file


def test_rejected_samples_are_logged_listed_and_measured_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = Folder(tmp_path)
    folder.add("good", "hi", "yes")
    folder.add("gone", "<image>", "yes", image="gone.png")
    folder.add("empty", "hi", " ")
    folder.add("empty2", "hi", "")
    index = build(folder, tokenizer)
    assert [int(tokens) == REJECTED for tokens in index.tokens] == [False, True, True, True]
    summary, *examples = describe_rejections(AnnotationSource(folder.write(), folder.images), index)
    assert "3 of 4 samples rejected: empty answer 2, missing image 1" in summary and str(index.rejected_file) in summary
    assert "'empty'" in examples[0] and "'gone'" in examples[1] and len(examples) == 2
    listed = [json.loads(line) for line in index.rejected_file.read_text().splitlines()]
    assert [item["sample_id"] for item in listed] == ["gone", "empty", "empty2"]
    (folder.images / "gone.png").write_bytes(image_bytes(9, 9))
    index = build(folder, tokenizer)
    assert index.tokens[1] > 0 and index.image_sizes(1) == [(9, 9)] and len(index.rejected) == 2
    assert same(build(folder, tokenizer), index)


def test_rejected_samples_are_measured_again_only_if_an_image_file_changed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = mixed_folder(tmp_path, 8), tmp_path / "measured"
    folder.add("empty", "hi", " ")
    folder.add("broken", "<image>", "yes", image=folder.image("broken.png", 3, 3))
    folder.add("gone", "<image><image>", "yes", image=["gone.png", "0_0.png"])
    folder.add("surrogate", "<image>", "yes", image="\ud800.png")
    (folder.images / "broken.png").write_bytes(b"nonsense")
    first = build(folder, tokenizer)
    _count_measured(folder, tokenizer, log, monkeypatch)
    assert same(build(folder, tokenizer), first) and not log.exists(), "nothing changed"

    file = folder.write()

    def start(_: int) -> LengthIndex:
        return load_length_index(AnnotationSource(file, folder.images), tokenizer, GEOMETRY, processes=1)

    (folder.images / "gone.png").write_bytes(image_bytes(9, 7))
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(start, range(3)))
    assert log.stat().st_size == 1, "one process measures the one sample whose image came"
    assert all(same(index, found[0]) for index in found)
    assert [rejection.sample_id for rejection in found[0].rejected] == ["empty", "broken", "surrogate"]
    assert found[0].image_sizes(10)[0] == (9, 7) and len(found[0].image_sizes(10)) == 2
    assert same(found[0], build(folder, tokenizer, cache_dir=tmp_path / "other"))
    assert found[0].image_sizes(7) == first.image_sizes(7)

    _forget_image_files(found[0].file)  # as an index of an earlier version
    log.unlink()
    assert same(build(folder, tokenizer), found[0]) and log.stat().st_size == 3
    assert same(build(folder, tokenizer), found[0]) and log.stat().st_size == 3


def _forget_image_files(path: Path) -> None:
    arrays = dict(map_arrays(path))
    rejected = [{**item, "image_files": None} for item in json.loads(arrays[lengths._REJECTIONS].tobytes())]
    write_arrays(path, **{**arrays, lengths._REJECTIONS: np.frombuffer(json.dumps(rejected).encode(), np.uint8)})


def test_a_damaged_index_is_rebuilt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = mixed_folder(tmp_path, 3)
    index = build(folder, tokenizer)
    next((tmp_path / ".lengths").glob("*.arrays")).write_bytes(b"nonsense")
    assert same(build(folder, tokenizer), index)


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Set cache_dir"):
        build(mixed_folder(tmp_path, 1), tokenizer, cache_dir=tmp_path / "file")


def _count_measured(folder: Folder, tokenizer: Tokenizer, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measured sample appends a byte to `log`, from whichever process."""
    original = lengths._Measurer.measure

    def measure(self: lengths._Measurer, index: int) -> lengths._SampleLengths:
        with log.open("ab") as file:
            file.write(b".")
        return original(self, index)

    monkeypatch.setattr(lengths._Measurer, "measure", measure)


def test_what_a_killed_process_measured_is_kept(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixed_folder(tmp_path, 12)
    folder.entries[3] = {"id": "broken"}
    expected = build(folder, tokenizer, cache_dir=tmp_path / "other", processes=1)
    log = tmp_path / "measured"
    _count_measured(folder, tokenizer, log, monkeypatch)
    monkeypatch.setattr(lengths, "_PART_SECONDS", 0.0)
    monkeypatch.setattr(lengths, "parallel_map", partial(lengths.parallel_map, chunk=1))
    write = lengths.PartialFiles.write

    def killed(self: lengths.PartialFiles, start: int, stop: int, arrays: dict[str, np.ndarray]) -> None:
        write(self, start, stop, arrays)
        if stop == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lengths.PartialFiles, "write", killed)
        build(folder, tokenizer, processes=1)
    assert log.stat().st_size == 7
    assert same(build(folder, tokenizer, processes=1), expected)
    assert log.stat().st_size == 12
    assert not list((tmp_path / ".lengths").rglob("*part*")), "the parts are removed"


def test_processes_that_start_together_measure_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = mixed_folder(tmp_path, 12), tmp_path / "measured"
    _count_measured(folder, tokenizer, log, monkeypatch)
    file = folder.write()

    def start(_: int) -> LengthIndex:  # each opens the lock by itself, as processes do
        return load_length_index(AnnotationSource(file, folder.images), tokenizer, GEOMETRY, processes=1)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(start, range(4)))
    assert log.stat().st_size == 12
    assert all(same(index, found[0]) for index in found)
