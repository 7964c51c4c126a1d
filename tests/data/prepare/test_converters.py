"""tools/convert_dataset.py: an example of each kind, and the errors for invalid rows."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_vlm.commands import convert_dataset
from megatron_vlm.data.prepare.converters import CONVERTERS
from megatron_vlm.data.prepare.reading_order import reading_order
from megatron_vlm.data.sources.annotations import parse_annotation
from tests.data.helpers import image_bytes


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def convert(tmp_path: Path, kind: str, source: Path, *flags: str, code: int = 0) -> list[dict[str, Any]]:
    output = tmp_path / "out.jsonl"
    arguments = ["--input", str(source), "--output", str(output), "--image-folder", str(tmp_path / "images"), *flags]
    assert convert_dataset.main([kind, *arguments]) == code
    entries = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    for index, entry in enumerate(entries):  # training accepts every entry
        parse_annotation(entry, index, "out.jsonl")
        names = entry.get("image", [])
        assert all((tmp_path / "images" / name).is_file() for name in ([names] if isinstance(names, str) else names))
    return entries


def texts(entry: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in entry["conversations"]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(image_bytes(9, 9, seed=ord(name[0])))
    return tmp_path / "images"


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    data = image_bytes(20, 10, kind="JPEG")
    table = pyarrow.Table.from_pylist(
        [
            {"image": {"bytes": data, "path": "x.jpg"}, "question": "What?", "answers": ["this", "that"]},
            {"image": {"bytes": data, "path": None}, "question": "And?", "answers": ["so"]},
            {"image": None, "question": "Text alone?", "answers": ["yes"]},
            {"image": {"bytes": data[:60], "path": None}, "question": "Broken?", "answers": ["yes"]},
        ]
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    entries = convert(tmp_path, "qa", tmp_path / "in.parquet", "--answer-column", "answers", "--suffix", "One word.")
    assert [texts(entry) for entry in entries] == [
        ["<image>\nWhat?\nOne word.", "this"], ["<image>\nAnd?\nOne word.", "so"], ["Text alone?\nOne word.", "yes"],
    ]  # fmt: skip
    assert (tmp_path / "images" / entries[0]["image"]).read_bytes() == data
    assert entries[0]["image"] == entries[1]["image"] and entries[0]["image"].endswith(".jpeg")
    assert "unreadable image" in (tmp_path / "out.jsonl.quarantine.jsonl").read_text()


def test_base64_images_and_invalid_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = base64.b64encode(image_bytes(9, 9)).decode()
    rows = [
        {"image": picture, "question": "What?", "answer": "This."},
        {"image": f"data:image/png;base64,{picture}", "question": "What?", "answer": "That."},
        {"image": "gone.png", "question": "What?", "answer": "This."},
        {"image": 7, "question": "What?", "answer": "This."},
        {"question": "What?"},
    ]
    entries = convert(tmp_path, "qa", rows_file(tmp_path / "in.jsonl", rows), code=1)
    assert len(entries) == 2 and entries[0]["image"] == entries[1]["image"]
    printed = capsys.readouterr()
    assert "5 samples read = 2 converted + 3 rejected; 2 entries written" in printed.out
    assert "3 of 5 samples were rejected, more than --max-rejected 50%" in printed.err
    for reason in ("missing image", "no image", "missing column"):
        assert reason in printed.err


def test_base64_images_in_a_table_saved_by_excel(tmp_path: Path) -> None:
    data = image_bytes(300, 300)
    text = f"\ufeffimage\tquestion\tanswer\n{base64.b64encode(data).decode()}\tWhat?\tThis.\n"
    (tmp_path / "in.tsv").write_text(text)
    (entry,) = convert(tmp_path, "qa", tmp_path / "in.tsv")
    assert len(text) > 1 << 17 and (tmp_path / "images" / entry["image"]).read_bytes() == data
    (tmp_path / "in.csv").write_bytes(b"image,question\n\xff,\x00\n")
    assert convert(tmp_path, "qa", tmp_path / "in.csv", code=2) == [entry]  # the previous output is kept


def test_words_to_reading_order(tmp_path: Path, images: Path) -> None:
    words = [
        {"text": "right", "box": [60, 11, 90, 21]},
        {"text": "second", "box": [[5, 40], [50, 40], [50, 50], [5, 50]]},
        {"text": "left", "box": [5, 10, 50, 20]},
        {"text": "###", "box": [0, 0, 5, 5]},
    ]
    rows = [{"image": "a.png", "words": words}, {"image": "a.png", "words": [{"text": "x", "box": [1]}]}]
    (entry,) = convert(tmp_path, "ocr", rows_file(tmp_path / "in.jsonl", rows), "--prompt", "Read.")
    assert texts(entry) == ["<image>\nRead.", "left right\nsecond"]
    assert reading_order([("b", 9, 0, 12, 4), ("a", 0, 1, 3, 5)]) == "a b"


def test_captions_with_a_pool(tmp_path: Path, images: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "text"], *(["a.png", f"caption {n}"] for n in range(40))])
    first = convert(tmp_path, "captions", tmp_path / "in.csv", "--caption-column", "text")
    prompts = {texts(entry)[0] for entry in first}
    assert len(prompts) > 5 and all(prompt.startswith("<image>\n") for prompt in prompts)
    assert [texts(entry)[1] for entry in first] == [f"caption {n}" for n in range(40)]
    half = convert(tmp_path, "captions", tmp_path / "in.csv", "--caption-column", "text", "--job", "2/2")
    assert [(entry["id"], texts(entry)) for entry in half] == [(e["id"], texts(e)) for e in first[1::2]]
    (tmp_path / "pool.txt").write_text("Only this.\n")
    own = convert(tmp_path, "captions", tmp_path / "in.csv", "--caption-column", "text", "--prompts",
                  str(tmp_path / "pool.txt"))  # fmt: skip
    assert {texts(entry)[0] for entry in own} == {"<image>\nOnly this."}


def test_every_caption_of_an_image_is_an_entry(tmp_path: Path, images: Path) -> None:
    rows = [
        {"image": "a.png", "caption": ["one", "two", "three"]}, {"image": "b.png", "caption": "four"},
        {"image": "b.png", "caption": []},
    ]  # fmt: skip
    entries = convert(tmp_path, "captions", rows_file(tmp_path / "in.jsonl", rows))
    written = [(entry["id"], entry["image"], texts(entry)[1]) for entry in entries]
    assert written == [("out-0", "a.png", "one"), ("out-1", "a.png", "two"), ("out-2", "a.png", "three"),
                       ("out-3", "b.png", "four")]  # fmt: skip
    assert "missing column" in (tmp_path / "out.jsonl.quarantine.jsonl").read_text()


def test_conversations_in_three_forms(tmp_path: Path, images: Path) -> None:
    data = image_bytes(8, 8)
    pairs = [{"user": "Both?", "assistant": "Yes."}, {"user": "Sure?", "assistant": "Yes."}]
    table = pyarrow.Table.from_pylist([{"images": [{"bytes": data, "path": None}] * 2, "texts": pairs}])
    parquet.write_table(table, tmp_path / "in.parquet")
    flags = ("--image-column", "images", "--turns-column", "texts")
    (entry,) = convert(tmp_path, "conversations", tmp_path / "in.parquet", *flags)
    assert texts(entry) == ["<image>\n<image>\nBoth?", "Yes.", "Sure?", "Yes."] and len(entry["image"]) == 2
    llava = [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A."}]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"id": 7, "image": "a.png", "conversations": llava}, {"conversations": chat},
        {"conversations": llava}, {"conversations": chat[:1]}, {"conversations": chat[::-1]}, {"conversations": ["hi"]},
        5,
    ]  # fmt: skip
    entries = convert(tmp_path, "conversations", rows_file(tmp_path / "in.jsonl", rows), "--max-rejected", "5")
    assert [(e["id"], texts(e)) for e in entries] == [("7", ["What is <image>?", "A."]), ("out-1", ["Hi", "Hello"])]
    rejected = (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["message"].partition(":")[0] for line in rejected] == [
        "image count mismatch", "no answer", "no answer", "unknown role", "no row",
    ]  # fmt: skip


def test_choices_with_a_rationale(tmp_path: Path, images: Path) -> None:
    question = {"image": "b.png", "question": "Which?", "choices": ["red", "blue"]}
    rows = [
        {**question, "answer": 1, "rationale": "It is the sky."},
        {**question, "answer": "(a)"},
        {**question, "answer": "blue", "image": None},
        {**question, "answer": "green"},
    ]
    entries = convert(tmp_path, "choice", rows_file(tmp_path / "in.jsonl", rows))
    asked = "Which?\nA. red\nB. blue\nAnswer with the letter of the right choice."
    assert [texts(entry) for entry in entries] == [
        [f"<image>\n{asked}", "B", "Why?", "It is the sky."], [f"<image>\n{asked}", "A"], [asked, "B"],
    ]  # fmt: skip


def test_turns_about_one_image_are_merged(tmp_path: Path, images: Path) -> None:
    def entry(number: int, image: str | None) -> dict[str, Any]:
        question = f"<image>\nq{number}" if image else f"q{number}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"a{number}"}]
        return {"id": f"e{number}", "conversations": turns, **({"image": image} if image else {})}

    rows = [entry(n, image) for n, image in enumerate(["a.png"] * 4 + ["b.png", None, None, "b.png"])]
    rows.append({"conversations": [{"from": "gpt", "value": "hi"}]})
    entries = convert(tmp_path, "merge", rows_file(tmp_path / "in.jsonl", rows), "--turns", "3")
    assert [(e["id"], texts(e)) for e in entries] == [
        ("e0", ["<image>\nq0", "a0", "q1", "a1", "q2", "a2"]), ("e3", ["<image>\nq3", "a3"]),
        ("e4", ["<image>\nq4", "a4"]), ("e5", ["q5", "a5"]), ("e6", ["q6", "a6"]), ("e7", ["<image>\nq7", "a7"]),
    ]  # fmt: skip


def test_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "riddles.py").write_text(
        "from megatron_vlm.data.prepare.converters import Converter, conversation, register\n"
        "@register\n"
        "class Riddles(Converter):\n"
        '    """riddle and solution"""\n'
        "    name = 'riddles'\n"
        "    def entry(self, row, images):\n"
        "        return conversation(row['riddle'], row['solution'])\n"
    )
    source = rows_file(tmp_path / "in.jsonl", [{"riddle": "What has hands?", "solution": "A clock."}])
    (entry,) = convert(tmp_path, "riddles", source, "--plugin", str(tmp_path / "riddles.py"))
    del CONVERTERS["riddles"]
    assert entry == {"id": "out-0", "conversations": entry["conversations"]} and texts(entry)[1] == "A clock."


def test_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path, "qa", tmp_path / "absent.jsonl", code=2) == []
    assert convert(tmp_path, "qa", tmp_path / "in.xml", code=2) == []
    assert convert(tmp_path, "qa", tmp_path / "in.jsonl", "--plugin", "absent.py", code=2) == []
    errors = capsys.readouterr().err
    assert "cannot be read" in errors and "expected a file ending in" in errors and "no such Python file" in errors
