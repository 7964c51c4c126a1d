"""Shards round-trip, and stock mosaicml-streaming reads them in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.mds_format import ShardSample, ShardWriter
from megatron_vlm.data.shards.reader import ShardFolder
from tests.data.helpers import image_bytes


def samples(count: int) -> list[ShardSample]:
    out = []
    for i in range(count):
        sizes = [(5 + i, 7), (4, 9)][: i % 3]
        images = [image_bytes(w, h, seed=i) for w, h in sizes]
        out.append(ShardSample({"id": f"s{i}", "value": "é"}, images, sizes))
    return out


def write(folder: Path, count: int = 30, size_limit: int = 2000) -> list[ShardSample]:
    written = samples(count)
    with ShardWriter(folder, size_limit) as writer:
        for sample in written:
            writer.write(sample)
    return written


def test_round_trip_over_several_shards(tmp_path: Path) -> None:
    written = write(tmp_path / "s")
    folder = ShardFolder(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("shard.*.mds"))) > 2
    assert len(folder) == 30
    for i in (29, 0, 7, 8, 15):  # random access
        assert folder[i] == written[i]
    assert not (tmp_path / "s.partial").exists()


def test_stock_streaming_reads_our_shards(tmp_path: Path) -> None:
    write(tmp_path / "s", 4)
    code = (
        "import sys, types\n"
        "for n in ('vision', 'text', 'multimodal'): sys.modules['streaming.' + n] = types.ModuleType(n)\n"
        "from streaming import StreamingDataset\n"
        f"d = StreamingDataset(local={str(tmp_path / 's')!r}, batch_size=1)\n"
        "print([s['annotation']['id'] for s in (d[i] for i in range(4))], d[2]['image_sizes'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "['s0', 's1', 's2', 's3'] [[7, 7], [4, 9]]" in result.stdout, result.stderr


def test_a_failed_write_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "s") as writer:
        writer.write(samples(1)[0])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_existing_shards_are_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "s", 1)
    with pytest.raises(DataError, match="not empty"):
        ShardWriter(tmp_path / "s")


def test_content_hash_changes_with_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a", 3)
    write(tmp_path / "b", 3)
    write(tmp_path / "c", 4)
    hashes = [ShardFolder(tmp_path / name).content_hash for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_folders_that_are_not_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ShardFolder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has no index\.json"):
        ShardFolder(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not an MDS index"):
        ShardFolder(tmp_path)
    write(tmp_path / "s", 3)
    index = tmp_path / "s" / "index.json"
    text = index.read_text()
    index.write_text(text.replace('"images"', '"pictures"'))
    with pytest.raises(DataError, match="has the columns"):
        ShardFolder(tmp_path / "s")
    index.write_text(text)
    name = json.loads(text)["shards"][0]["raw_data"]["basename"]
    (tmp_path / "s" / name).unlink()
    with pytest.raises(DataError, match=f"lacks 1 of 2 files, the first is {name}"):
        ShardFolder(tmp_path / "s")
