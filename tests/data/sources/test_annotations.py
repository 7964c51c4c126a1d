"""Annotation files are read as written, and every kind of invalid entry is rejected with a reason."""

from __future__ import annotations

import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.sources import annotation_file
from megatron_vlm.data.sources.annotation_file import AnnotationFile
from megatron_vlm.data.sources.annotations import parse_annotation
from tests.data.helpers import Folder, conversation


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_entries_are_read_as_written(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path)
    folder.add("é1", "<image>\nWhat?", "A dög.", image="x/y.png", image_size=[3, 4])
    folder.add("two", "Hi", "Yes", image=None)
    file = AnnotationFile(folder.write(name))
    assert len(file) == 2
    assert [file.entry(i) for i in range(2)] == folder.entries


@pytest.mark.parametrize(
    ("image", "paths", "question"),
    [
        ("a.png", ["a.png"], "<image> hi"),
        (["a.png", "b.png"], ["a.png", "b.png"], "<image><image> hi"),
        (None, [], "hi"),
        ("", [], "hi"),
        ([], [], "hi"),
    ],
)
def test_image_field(image: Any, paths: list[str], question: str) -> None:
    annotation = parse_annotation({"id": 7, "image": image, "conversations": conversation(question, "yes")}, 0, "f")
    assert (annotation.id, annotation.image_paths) == ("7", paths)


PART = {"type": "image", "path": "a.png"}
ASKED = [Turn("human", "<image>\nWhat?"), Turn("gpt", "This.")]


@pytest.mark.parametrize(
    "given",
    [
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nWhat?"},
                                           {"role": "assistant", "content": "This."}]},
        {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "What?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]},
        {"image": "a.png", "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "This."}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                                   {"type": "text", "text": "What?"}]},
                      {"role": "assistant", "content": "This."}]},
        {"image": "a.png", "conversations": json.dumps(conversation("<image>\nWhat?", "This."))},
        {"image": "a.png", "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "This."]}},
        {"image": "a.png", "conversations": [{"user": "<image>\nWhat?", "assistant": "This."}]},
        {"image": "a.png", "images": "a.png", "conversations": conversation("<image>\nWhat?", "This.")},
    ],
)  # fmt: skip
def test_the_forms_of_a_conversation(given: dict[str, Any]) -> None:
    annotation = parse_annotation(given, 0, "f")
    assert (annotation.turns, annotation.image_paths) == (ASKED, ["a.png"])


def test_a_system_turn_comes_first() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *conversation("hi", "yes")]
    annotation = parse_annotation({"messages": messages}, 0, "f")
    assert annotation.turns == [Turn("system", "Be brief."), Turn("human", "hi"), Turn("gpt", "yes")]


def test_a_trailing_question_goes_with_its_images() -> None:
    texts = ("<image> one?", "yes", "<image> and this?")
    annotation = parse_annotation({"image": ["a", "b"], "conversations": conversation(*texts)}, 0, "f")
    assert annotation.turns == [Turn("human", "<image> one?"), Turn("gpt", "yes")]
    assert annotation.image_paths == ["a"]


def test_metadata_about_an_image_is_no_image() -> None:
    more = {"image_id": 5, "image_size": [3, 4], "frame_rate": "x", "url": "https://example.com", "source": "coco"}
    assert parse_annotation({"conversations": conversation("hi", "yes"), **more}, 0, "f").image_paths == []


def test_a_leading_answer_is_dropped() -> None:
    messages = [{"from": "gpt", "value": "hello"}, *conversation("hi", "yes")]
    annotation = parse_annotation({"conversations": messages}, 3, "f")
    assert annotation.turns == [Turn("human", "hi"), Turn("gpt", "yes")]
    assert annotation.id == "#3"


def entry(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "bad", "conversations": [{"from": role, "value": text} for role, text in messages], **more}


INVALID: list[tuple[Any, str]] = [
    ("text", "not an entry"),
    ({"id": "bad"}, "no conversation"),
    (entry(), "no conversation"),
    (entry(("human", "hi"), ("gpt", "yes"), image="a.png"), "image count mismatch"),
    (entry(("human", "<image> hi"), ("gpt", "yes")), "image count mismatch"),
    (entry(("human", "<image> hi"), ("gpt", "yes"), image=["a", "b"]), "image count mismatch"),
    (entry(("human", "hi"), ("gpt", " \n")), "empty answer"),
    (entry(("human", "hi"), ("robot", "yes")), "unknown role"),
    (entry(("human", "hi"), ("gpt", None)), "no text"),
    (entry(("human", "hi"), ("human", "hi")), "turns out of order"),
    (entry(("gpt", "a"), ("gpt", "b"), ("human", "hi")), "turns out of order"),
    (entry(("human", "hi")), "no answer"),
    (entry(("gpt", "a")), "no answer"),
    (entry(("human", "hi"), ("gpt", "<image>")), "image in an answer"),
    (entry(("human", "hi"), ("gpt", "a"), image=[3]), "bad image path"),
    (entry(("human", "hi"), ("gpt", "a"), image={"path": "x"}), "bad image path"),
    (entry(("human", "<image>"), ("gpt", "a"), video="a.mp4"), "video"),
    (entry(("human", "hi"), ("gpt", "a"), image_path="a.png"), "unknown image key"),
    (entry(("human", "hi"), ("gpt", "a"), img="folder/a"), "unknown image key"),
    (entry(("human", "hi"), ("gpt", "a"), pictures=[{"path": "a.jpeg"}]), "unknown image key"),
    (entry(("human", "hi"), ("gpt", "a"), cover_photo="https://example.com/1"), "unknown image key"),
    (entry(("human", "<image>"), ("gpt", "a"), image_path="a.png"), "unknown image key"),
    (entry(("human", "hi"), ("gpt", "a"), images=["a.png"]), "image count mismatch"),
    (entry(("human", "<image>"), ("gpt", "a"), image="a.png", images=["b.png"]), "bad image path"),
    (entry(("human", "<image>"), ("gpt", "a"), image=" "), "bad image path"),
    (entry(("system", "x"), ("gpt", "a")), "no answer"),
    (entry(("human", "hi"), ("gpt", "a"), ("system", "x"), ("human", "hi"), ("gpt", "a")), "turns out of order"),
    (entry(("system", "<image>"), ("human", "hi"), ("gpt", "a")), "image in an answer"),
    ({"id": "bad", "conversations": "[{'from': 'human'}]"}, "no conversation"),
    ({"id": "bad", "conversations": {"from": ["human"], "value": []}}, "no conversation"),
    ({"id": "bad", "question": "hi", "answer": "a"}, "no conversation"),
    ({"id": "bad", "messages": ["hi"]}, "unknown role"),
    ({"id": "bad", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "no text"),
    ({"id": "bad", "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "no text"),
]


@pytest.mark.parametrize(("bad", "reason"), INVALID)
def test_invalid_entries_are_rejected(bad: Any, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_annotation(bad, 4, "train.json")
    error = caught.value
    assert error.reason == reason
    assert error.sample_id == ("bad" if isinstance(bad, dict) else "#4")
    for part in (repr(error.sample_id), "train.json", reason, error.what, error.remedy):
        assert part in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1,", "not JSON"),
        ("a.json", "{}", r"a\.json begins with '\{'"),
        ("a.json", "[]", "no entry"),
        ("a.jsonl", "\n\n", "no entry"),
        ("a.ndjson", "\n", "no entry"),
    ],
)
def test_files_that_are_not_annotations(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        AnnotationFile(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read: No such file or directory\. Check the path"):
        AnnotationFile("nowhere.json")
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"Did you mean .*train\.jsonl\?"):
        AnnotationFile(tmp_path / "trian.jsonl")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_large_file_is_scanned_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    for number in range(3):
        folder.add(str(number), "Hi", f"{'long ' * 80_000}{number}")
    path = folder.write(name)
    first = AnnotationFile(path, tmp_path / "cache")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first.content_hash() == digest == AnnotationFile(path).content_hash()
    monkeypatch.setattr(annotation_file, "find_items", lambda file: pytest.fail("scanned again"))
    monkeypatch.setattr(annotation_file, "find_lines", lambda file: pytest.fail("scanned again"))
    monkeypatch.setattr(annotation_file, "_digest", lambda file: pytest.fail("hashed again"))
    again = AnnotationFile(path, tmp_path / "cache")
    assert again.content_hash() == digest and [again.entry(i) for i in range(3)] == folder.entries
    monkeypatch.undo()
    folder.add("3", "Hi", "Yes")
    folder.write(name)
    changed = AnnotationFile(path, tmp_path / "cache")
    assert len(changed) == 4 and changed.content_hash() == hashlib.sha256(path.read_bytes()).hexdigest()
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(AnnotationFile(path, tmp_path / "cache")) == 4
    assert len(AnnotationFile(path, path)) == 4  # a cache that cannot be written


def test_processes_that_start_together_scan_a_large_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scans = Folder(tmp_path), []
    folder.add("0", "Hi", "long " * 250_000)
    path = folder.write()
    original = annotation_file.find_items
    monkeypatch.setattr(annotation_file, "find_items", lambda file: scans.append(1) or original(file))
    with ThreadPoolExecutor(4) as threads:  # each opens the lock by itself, as processes do
        files = list(threads.map(lambda _: AnnotationFile(path, tmp_path / "cache"), range(4)))
    assert len(scans) == 1 and {file.content_hash() for file in files} == {files[0].content_hash()}
    assert all(file.entry(0) == folder.entries[0] for file in files)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no lock is left"


def test_a_malformed_line_is_one_invalid_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": \n')
    file = AnnotationFile(tmp_path / "a.jsonl")
    assert file.entry(0) == {"id": 1}
    with pytest.raises(SampleError, match="not JSON"):
        file.entry(1)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_that_changes_after_it_was_opened(tmp_path: Path, name: str) -> None:
    """If it is replaced by a rename, the old content is still read. If it is overwritten, its entries are rejected."""
    folder = Folder(tmp_path)
    folder.add("one", "Hi", "Yes")
    path = folder.write(name)
    file = AnnotationFile(path)
    (tmp_path / "other").write_text("[1]")
    (tmp_path / "other").replace(path)
    assert file.entry(0) == folder.entries[0]
    file = AnnotationFile(folder.write(name))
    path.write_text("[")
    with pytest.raises(SampleError, match="not JSON"):
        file.entry(0)
