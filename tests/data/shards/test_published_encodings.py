"""Shards with the published columns are read by us, and by mosaicml-streaming once the encodings are registered."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.shards.published_encodings import join_jpeg_list, split_jpeg_list
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.data.shards.streaming_shim import import_streaming
from megatron_vlm.data.sources.sample_source import ShardSource
from tests.data.helpers import conversation, make_recipe, tiny_tokenizer_folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def entry(number: int, images: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}", **more,
        "conversations": conversation("<image>\n" * images + f"What is {number}?", f"It is {number}."),
    }  # fmt: skip


def write(folder: Path, samples: list[tuple[Any, dict[str, Any]]], encoding: str = "jpeg:95") -> None:
    """As the published packer: one folder per process, merged into one index."""
    streaming = import_streaming()
    for part in range(2):
        with streaming.MDSWriter(
            out=str(folder / str(part)), columns={"image": encoding, "text": "json"}, size_limit="64mb"
        ) as out:
            for image, text in samples[part::2]:
                out.write({"image": image, "text": text})
    streaming.base.util.merge_index(str(folder), keep_local=True)


PLACEHOLDER = picture(1, 1)


def test_images_and_placeholders(tmp_path: Path) -> None:
    samples = [
        (picture(20, 10), entry(0, image="0.jpg")),
        (PLACEHOLDER, entry(1, 0)),
        (picture(9, 9), entry(2, image="2.jpg")),
        (PLACEHOLDER, entry(3, 0, image=None)),  # the published reader treated this one as an image
        (PLACEHOLDER, entry(4, 0, image="")),
        (PLACEHOLDER, entry(5, 1, image="a real image of one pixel.jpg")),
    ]
    write(tmp_path / "s", samples)
    source = ShardSource(tmp_path / "s")
    by_id = {sample.id: sample for sample in map(source.sample, range(6))}
    assert {name: sample.measure_images() for name, sample in by_id.items()} == {
        "p0": [(20, 10)], "p1": [], "p2": [(9, 9)], "p3": [], "p4": [], "p5": [(1, 1)],
    }  # fmt: skip
    assert Image.open(io.BytesIO(by_id["p0"].read_image(0))).format == "JPEG"


def test_jpeg_list(tmp_path: Path) -> None:
    images = [picture(20, 10), picture(5, 7), picture(300, 200)]
    write(tmp_path / "s", [(images, entry(0, 3, image=["a", "b", "c"])), ([], entry(1, 0))], "jpeg_list")
    source = ShardSource(tmp_path / "s")
    assert source.sample(0).measure_images() == [(20, 10), (5, 7), (300, 200)]
    assert source.sample(1).measure_images() == []
    assert split_jpeg_list(join_jpeg_list([b"a" * 70_000, b"", b"xyz"])) == [b"a" * 70_000, b"", b"xyz"]
    assert join_jpeg_list([b"xyz"]) == b"\x00\x00\x03xyz"  # 3-byte big-endian length
    with pytest.raises(ValueError, match="ends at"):
        split_jpeg_list(b"\x00\x00\x09xyz")


def test_streaming_reads_registered_encodings(tmp_path: Path) -> None:
    write(tmp_path / "s", [(picture(20, 10), entry(0, image="0.jpg")), (PLACEHOLDER, entry(1, 0))])
    data = import_streaming().LocalDataset(local=str(tmp_path / "s"))
    assert [sample["image"].size for sample in (data[0], data[1])] == [(20, 10), (1, 1)]
    encodings = import_streaming().base.format.mds.encodings
    with pytest.raises(ValueError, match="0 to 100"):
        encodings.mds_encode("jpeg:101", PLACEHOLDER)
    small, large = (len(encodings.mds_encode(f"jpeg:{q}", picture(99, 99))) for q in (5, 95))
    assert small < large / 2


def test_mismatched_image_counts_and_unknown_columns(tmp_path: Path) -> None:
    write(tmp_path / "s", [(picture(5, 5), entry(0, 2, image=["a", "b"])), (PLACEHOLDER, entry(1, 0))])
    with pytest.raises(SampleError, match="names 2 images, the shard has 1"):
        ShardSource(tmp_path / "s").sample(0)
    with import_streaming().MDSWriter(out=str(tmp_path / "o"), columns={"picture": "bytes"}) as out:
        out.write({"picture": b"x"})
    with pytest.raises(DataError, match=r"has the columns \['picture'\]"):
        ShardFolder(tmp_path / "o")


def test_the_loader_reads_published_shards(tmp_path: Path) -> None:
    samples = [(picture(8 + n, 20 - n, n), entry(n, image=f"{n}.jpg")) for n in range(8)]
    samples += [(PLACEHOLDER, entry(n, 0)) for n in range(8, 12)]
    write(tmp_path / "s", samples)
    tokenizer = tiny_tokenizer_folder(tmp_path / "tokenizer")
    recipe = make_recipe(tmp_path / "s", None, tokenizer, global_batch_size=1)
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    seen = [name for _ in range(loader.plan.rows) for name in next(loader).sample_ids]
    assert sorted(seen) == sorted(f"p{n}" for n in range(12))
    assert loader.summary()["rejected"] == {}
