"""The index finds the entries that Python's json module finds, for any block size."""

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


def _random_value(rng: random.Random, depth: int) -> Any:
    texts = ["", "é 中 😀", 'quote " and \\ and ] , [', "\ud83d", "a\nb\x7f", "\u0085\u2028"]
    plain = [rng.choice(texts), rng.randrange(-(10**9), 10**9), rng.random() * 1e-7, True, None]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(plain)
    inside = [_random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return inside if rng.random() < 0.5 else {rng.choice(texts) + str(i): value for i, value in enumerate(inside)}


def _parse_items(content: bytes) -> list[Any]:
    return [json.loads(content[a:b].decode("utf-8", "surrogatepass")) for a, b in find_items(io.BytesIO(content))]


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8], ids=["plain", "bom"])
def test_items_match_the_json_module(block: int, bom: bytes) -> None:
    rng = random.Random(block)
    for _ in range(60):
        items = [_random_value(rng, 3) for _ in range(rng.randint(1, 6))]
        ascii_only, indent = rng.random() < 0.5, rng.choice([None, 1])
        text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
        assert _parse_items(bom + f" {text}\r\n".encode("utf-8", "surrogatepass")) == items


def test_numbers_are_not_split_at_a_block_boundary(block: int) -> None:
    assert _parse_items(b"[123456789012, -1.5e300,0]") == [123456789012, -1.5e300, 0]
    assert _parse_items(b"[]") == _parse_items(b" [ ] ") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no entry"),
        (b"  ", "has no entry"),
        (b'{"id": 1}', r"begins with '\{', expected '\[': a list .* \.jsonl"),
        (b'[{"id": 1}', "',' or ']' is missing after an entry, at byte 10"),
        (b'[{"id": 1}, {"id": "x', "not JSON: .* at byte 19"),
        (b'[{"id": 1} {"id": 2}]', "',' or ']' is missing after an entry, at byte 12"),
        (b'[{"id": 1},]', "not JSON: Expecting value, at byte 11"),
        (b'[{"id": 1}] {}', "extra data after the list, at byte 13"),
        ("[1]".encode("utf-16"), "is encoded in utf-16"),
        ("[1]".encode("utf-32-le"), "is encoded in utf-32"),
    ],
)
def test_files_that_are_not_a_list_are_rejected(block: int, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(find_items(io.BytesIO(content)))


def test_a_damaged_entry_does_not_load_the_rest_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_index, "_BLOCK", 64)
    monkeypatch.setattr(json_index, "MAX_ENTRY_BYTES", 1000)
    file = io.BytesIO(b'[{"id" 1}' + b" " * 100_000)
    with pytest.raises(ValueError, match="Expecting ':' delimiter, at byte 7"):
        list(find_items(file))
    assert file.tell() < 3000


def test_lines() -> None:
    content = codecs.BOM_UTF8 + '{"a": "é"}\r\n\n  \n{"b": 2}'.encode()
    found = [json.loads(content[a:b]) for a, b in find_lines(io.BytesIO(content))]
    assert found == [{"a": "é"}, {"b": 2}]
    assert list(find_lines(io.BytesIO(b""))) == []
