"""convert-dataset: rows that cannot be meant as they are are rejected with a reason, never text or a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.commands import convert_dataset
from tests.data.helpers import image_bytes
from tests.data.prepare.test_converters import convert, rows_file, texts

VQA = [
    {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(["net", "a net", "net"])
]
ASK = {"question": "What?", "answer": "This."}
PICK = {"question": "Which?", "choices": ["red", "blue"], "answer": "A"}
WORD = {"text": "hi", "box": [0, 0, 5, 5]}
TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}

ASKED_AGAIN = {"from": "human", "value": "Hi?"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(9, 9))
    (tmp_path / "images" / "broken.png").write_bytes(image_bytes(9, 9)[:60])
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("qa", {**ASK, "answer": VQA}, ["What?", "net"]),
        ("qa", {**ASK, "answer": json.dumps(VQA)}, ["What?", "net"]),
        ("qa", {**ASK, "answer": str(VQA)}, ["What?", "net"]),
        ("qa", {**ASK, "answer": {"text": ["yes"], "answer_start": [5]}}, ["What?", "yes"]),
        ("qa", {**ASK, "answer": ["", None, "b", "a", "a"]}, ["What?", "a"]),
        ("qa", {**ASK, "answer": "[0.1, 0.2]"}, ["What?", "[0.1, 0.2]"]),
        ("qa", {**ASK, "answer": 3}, ["What?", "3"]),
        ("qa", {"question": "<image>\nWhat?", "answer": "x", "image": "a.png"}, ["<image>\nWhat?", "x"]),
        ("qa", {"question": "What is <image>?", "answer": "x", "image": "a.png"}, ["What is <image>?", "x"]),
        ("choice", {**PICK, "choices": "['red', 'blue']"}, "red"),
        ("choice", {**PICK, "choices": '["red", "blue"]'}, "red"),
        ("choice", {**PICK, "choices": {"text": ["red", "blue"], "label": ["A", "B"]}}, "red"),
        ("choice", {**PICK, "answer": 0.0, "rationale": float("nan")}, "red"),
        ("captions", {"image": "a.png", "caption": "['one']"}, "<image>\n"),
        ("conversations", {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"},
                                        {"role": "assistant", "content": "Hello"}]}, ["Brief.", "Hi", "Hello"]),
        ("conversations", {"conversations": json.dumps(TALK["conversations"])}, ["Hi", "Hello"]),
        ("conversations", {"conversations": [*TALK["conversations"], ASKED_AGAIN]}, ["Hi", "Hello"]),
        ("ocr", {"image": "a.png", "words": json.dumps([WORD])}, "hi"),
    ],
)  # fmt: skip
def test_rows_that_can_be_read(tmp_path: Path, images: Path, kind: str, row: dict[str, Any], expected: Any) -> None:
    (entry,) = convert(tmp_path, kind, rows_file(tmp_path / "in.jsonl", [row]))
    if isinstance(expected, list):
        assert texts(entry) == expected
    else:
        assert expected in "".join(texts(entry))
    assert texts(entry)[-1] not in ("[", "['one']")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(("qa", {**ASK, "answer": value}, "missing column") for value in (None, "", "  ", "NaN", float("nan"), [], [""])),
    *(("qa", {**ASK, "answer": value}, "no text") for value in (False, True, {"score": 1}, float("inf"), [False])),
    ("qa", {**ASK, "question": ["What?"]}, "no text"),
    ("qa", {**ASK, "question": {"text": "What?"}}, "no text"),
    ("qa", {**ASK, "question": "<image>\nWhat?"}, "image count mismatch"),
    ("qa", {**ASK, "question": "<image><image>", "image": "a.png"}, "image count mismatch"),
    ("qa", {**ASK, "answer": "<image>", "image": "a.png"}, "image in an answer"),
    ("qa", {**ASK, "image_path": "a.png"}, "unknown image key"),
    ("qa", {**ASK, "img": {"path": "a.png"}}, "unknown image key"),
    ("qa", {**ASK, "image": "https://example.com/a.png"}, "image is a URL"),
    ("qa", {**ASK, "image": "https://example.com/" + "a" * 80 + ".png"}, "image is a URL"),
    ("qa", {**ASK, "image": "broken.png"}, "unreadable image"),
    ("qa", {**ASK, "image": "a\0.png"}, "missing image"),
    ("qa", {**ASK, "image": True}, "no image"),
    ("qa", {**ASK, "question": "\ud800"}, "no text"),
    ("captions", {"image": "a.png", "caption": {"en": "x"}}, "no text"),
    ("captions", {"image": "a.png", "caption": False}, "no text"),
    ("captions", {"image": None, "caption": "x"}, "missing column"),
    ("choice", {**PICK, "choices": [str(n) for n in range(30)]}, "bad choices"),
    ("choice", {**PICK, "choices": ["red"]}, "bad choices"),
    ("choice", {**PICK, "choices": ["red", "red"]}, "bad choices"),
    ("choice", {**PICK, "choices": "red; blue"}, "no list"),
    ("choice", {**PICK, "choices": "['red' 'blue' 'green']"}, "no list"),
    ("choice", {**PICK, "choices": "[" * 3000 + "]" * 3000}, "no list"),
    ("choice", {**PICK, "choices": ["red", None]}, "missing column"),
    ("choice", {**PICK, "choices": 5}, "no list"),
    *(("choice", {**PICK, "answer": value}, "unknown answer") for value in ("²", -1, 2, "C", True, ["A"], "red blue")),
    ("ocr", {"image": "a.png", "words": ["hi"]}, "bad word"),
    ("ocr", {"image": "a.png", "words": "hi"}, "no list"),
    ("ocr", {"image": "a.png", "words": [{"text": "hi", "box": "0 0 5 5"}]}, "bad box"),
    ("ocr", {"image": "a.png", "words": [{"text": "hi", "box": [0, 0, float("nan"), 5]}]}, "bad box"),
    ("ocr", {"image": "a.png", "words": [{"text": False, "box": [0, 0, 5, 5]}]}, "no text"),
    ("conversations", {"conversations": "hello"}, "no conversation"),
    ("conversations", {"conversations": [1]}, "unknown role"),
    ("merge", {"conversations": "hello"}, "no conversation"),
    ("merge", {"conversations": [["human", "Hi"]]}, "unknown role"),
    ("merge", {**TALK, "image": "a.png"}, "image count mismatch"),
]


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in WRONG}))
def test_rows_that_are_rejected(tmp_path: Path, images: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(row, reason) for wrong, row, reason in WRONG if wrong == kind]
    assert not convert(tmp_path, kind, rows_file(tmp_path / "in.jsonl", [row for row, _ in rows]), code=1)
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in listed] == [reason for _, reason in rows]
    assert all(item["message"].startswith(f"{item['reason']}: ") and item["row"] for item in listed)
    assert f"{len(rows)} samples read = 0 converted + {len(rows)} rejected" in capsys.readouterr().out


def test_rows_that_cannot_be_parsed(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text("question,answer\nWhat?,This.\nWhat, now?,This.\nOr?\n")
    entries = convert(tmp_path, "qa", tmp_path / "in.csv", "--max-rejected", "90%")
    assert [texts(entry) for entry in entries] == [["What?", "This."]]
    assert "too many cells" in capsys.readouterr().err
    text = f'{json.dumps(ASK)}\n{{"question": \n{"[" * 100000}\n5\n'.encode() + b'{"question": "\xff"}\n'
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text))
    assert len(convert(tmp_path, "qa", tmp_path / "in.jsonl.gz", code=1)) == 1
    assert "5 samples read = 1 converted + 4 rejected" in capsys.readouterr().out


def test_a_plugin_that_fails_on_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from megatron_vlm.data.prepare.converters import CONVERTERS, Converter, conversation, register\n"
        "@register\n"
        "class Fragile(Converter):\n"
        '    """a test"""\n'
        "    name = 'fragile'\n"
        "    def entry(self, row, images):\n"
        "        return conversation(row['a'], row['b'], image='nowhere.png' if row['b'] == 'z' else None)\n"
    )
    rows = [{"a": "x"}, {"a": "x", "b": "y"}, {"a": 1, "b": "y"}, {"a": "x", "b": "z"}]
    entries = convert(tmp_path, "fragile", rows_file(tmp_path / "in.jsonl", rows), "--plugin", str(plugin), code=1)
    convert_dataset.CONVERTERS.pop("fragile")
    assert len(entries) == 1
    printed = capsys.readouterr()
    assert "4 samples read = 1 converted + 3 rejected" in printed.out
    assert "2  cannot be converted" in printed.err and "1  missing image" in printed.err
    plugin.write_text("def")
    convert(tmp_path, "qa", tmp_path / "in.jsonl", "--plugin", str(plugin), code=2)
    assert "plugin.py: SyntaxError" in capsys.readouterr().err


def test_the_list_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "in.jsonl", [ASK, {}])
    convert(tmp_path, "qa", source)
    assert (tmp_path / "out.jsonl.quarantine.jsonl").exists()
    convert(tmp_path, "qa", rows_file(source, [ASK]))
    assert not (tmp_path / "out.jsonl.quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "."], "--output . is a folder: give the file to write"),
        (["--input", "."], "--input . is a folder"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "is also an input"),
        (["--image-folder", "in.jsonl"], "--image-folder in.jsonl is a file"),
        (["--input", "coco.json"], "save its list annotations or images as a file"),
        (["--input", "text.json"], "expected a list of rows, got str"),
        (["--input", "deep.json"], "nested too deeply"),
        (["--input", "half.csv.gz"], "half.csv.gz cannot be read"),
        (["--input", "in.parquet.gz"], "expected a file ending in"),
        (["--input", "bad.parquet"], "bad.parquet cannot be read"),
        (["--input", "empty.jsonl"], "no row in empty.jsonl"),
    ],
)
def test_paths_of_the_wrong_kind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "in.jsonl", [ASK])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "coco.json").write_text('{"info": {}, "annotations": [], "images": []}')
    (tmp_path / "text.json").write_text('"hi"')
    (tmp_path / "deep.json").write_text("[" * 100000)
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(b"question,answer\nWhat?,This\n")[:-9])
    for name in ("in.parquet.gz", "bad.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    given = {"--input": "in.jsonl", "--output": "out.jsonl", "--image-folder": "images"}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    code = convert_dataset.main(["qa", *(part for pair in given.items() for part in pair)])
    assert code == (1 if "empty" in message else 2)
    assert message in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_text() == json.dumps(ASK) + "\n"


@pytest.mark.parametrize("limit", ["half", "-1", "101%", "1.5"])
def test_max_rejected_is_checked(tmp_path: Path, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert_dataset.main(["qa", "--input", "x", "--output", "y", "--image-folder", "z", "--max-rejected", limit])
    assert "expected a number of samples" in capsys.readouterr().err


def test_help_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in convert_dataset.CONVERTERS:
        with pytest.raises(SystemExit):
            convert_dataset.main([kind, "--help"])
        assert "--max-rejected N|P%" in capsys.readouterr().out
