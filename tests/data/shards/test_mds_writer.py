"""Shard files are byte for byte those of mosaicml-streaming's own writer."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import mds_writer
from megatron_vlm.data.shards.mds_writer import MDSWriter
from megatron_vlm.data.shards.streaming_shim import import_streaming

COLUMNS = {"text": "json", "image": "bytes"}


def samples(count: int, largest: int = 400) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"text": {"id": f"s{i}", "value": "é" * (i % 7), "turns": [i, None]}, "image": rng.randbytes(i % largest)}
        for i in range(count)
    ]


def write(folder: Path, written: list[dict[str, Any]], size_limit: int) -> dict[str, bytes]:
    writer = MDSWriter(folder, COLUMNS, size_limit)
    for sample in written:
        writer.write(sample)
    writer.finish()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size_limit", [3000, 1 << 26])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_same_files_as_streaming_writes(tmp_path: Path, count: int, size_limit: int) -> None:
    ours = write(tmp_path / "ours", samples(count), size_limit)
    with import_streaming().MDSWriter(
        out=str(tmp_path / "theirs"), columns=COLUMNS, hashes=["sha1"], size_limit=size_limit, progress_bar=False
    ) as writer:
        for sample in samples(count):
            writer.write(sample)
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert (len(ours) > 3) == (count == 100 and size_limit == 3000)


def test_a_sample_beyond_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    large = {"text": "large", "image": bytes(5000)}
    files = write(tmp_path / "s", [large, *samples(2), large], 3000)
    shards = json.loads(files["index.json"])["shards"]
    assert [shard["samples"] for shard in shards] == [1, 2, 1]
    for shard in shards:
        data = files[shard["raw_data"]["basename"]]
        assert len(data) == shard["raw_data"]["bytes"]
        assert hashlib.sha1(data).hexdigest() == shard["raw_data"]["hashes"]["sha1"]


def test_more_than_the_format_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="at most 4 GiB"):
        MDSWriter(tmp_path / "limit", COLUMNS, 1 << 32)
    monkeypatch.setattr(mds_writer, "_LARGEST_FILE", 4000)
    writer = MDSWriter(tmp_path / "sample", COLUMNS, 3000)
    with pytest.raises(DataError, match="a sample of 5,0[0-9]+ bytes"):
        writer.write({"text": "large", "image": bytes(5000)})
