"""Entries are found where Python's own parser finds them, however the file falls into blocks."""

from __future__ import annotations

import codecs
import io
import json
import random
from typing import Any

import pytest

from megatron_vlm.data.sources import json_index
from megatron_vlm.data.sources.json_index import find_items, find_lines


@pytest.fixture(params=[1, 7, 1 << 22])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_index, "_BLOCK", request.param)
    return int(request.param)


def _value(draw: random.Random, depth: int) -> Any:
    texts = ["", "é 中 😀", 'quote " and \\ and ] , [', "\ud83d", "a\nb\x7f", "\u0085\u2028"]
    plain = [draw.choice(texts), draw.randrange(-(10**9), 10**9), draw.random() * 1e-7, True, None]
    if depth == 0 or draw.random() < 0.4:
        return draw.choice(plain)
    inside = [_value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return inside if draw.random() < 0.5 else {draw.choice(texts) + str(i): value for i, value in enumerate(inside)}


def _cut(content: bytes) -> list[Any]:
    return [json.loads(content[a:b].decode("utf-8", "surrogatepass")) for a, b in find_items(io.BytesIO(content))]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
def test_items_are_those_of_pythons_parser(block: int, mark: bytes) -> None:
    draw = random.Random(block)
    for _ in range(60):
        items = [_value(draw, 3) for _ in range(draw.randint(1, 6))]
        ascii_only, indent = draw.random() < 0.5, draw.choice([None, 1])
        text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
        assert _cut(mark + f" {text}\r\n".encode("utf-8", "surrogatepass")) == items


def test_numbers_are_not_cut(block: int) -> None:
    assert _cut(b"[123456789012, -1.5e300,0]") == [123456789012, -1.5e300, 0]
    assert _cut(b"[]") == _cut(b" [ ] ") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no entry"),
        (b"  ", "has no entry"),
        (b'{"id": 1}', r"begins with '\{' where a list .* \.jsonl"),
        (b'[{"id": 1}', "',' or ']' is missing after an entry, at byte 10"),
        (b'[{"id": 1}, {"id": "x', "not JSON: .* at byte 19"),
        (b'[{"id": 1} {"id": 2}]', "',' or ']' is missing after an entry, at byte 12"),
        (b'[{"id": 1},]', "not JSON: Expecting value, at byte 11"),
        (b'[{"id": 1}] {}', "something follows the list, at byte 13"),
        ("[1]".encode("utf-16"), "is in utf-16"),
        ("[1]".encode("utf-32-le"), "is in utf-32"),
    ],
)
def test_what_is_no_list_is_told(block: int, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(find_items(io.BytesIO(content)))


def test_a_damaged_entry_does_not_draw_in_the_rest_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_index, "_BLOCK", 64)
    monkeypatch.setattr(json_index, "LONGEST_ENTRY", 1000)
    file = io.BytesIO(b'[{"id" 1}' + b" " * 100_000)
    with pytest.raises(ValueError, match="Expecting ':' delimiter, at byte 7"):
        list(find_items(file))
    assert file.tell() < 3000


def test_lines() -> None:
    content = codecs.BOM_UTF8 + '{"a": "é"}\r\n\n  \n{"b": 2}'.encode()
    found = [json.loads(content[a:b]) for a, b in find_lines(io.BytesIO(content))]
    assert found == [{"a": "é"}, {"b": 2}]
    assert list(find_lines(io.BytesIO(b""))) == []
