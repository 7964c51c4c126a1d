"""Each image format and each kind of damage: decoded, written by prepare_shards, and read by the training loader."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.processing import image_io as images
from megatron_vlm.data.processing.image_io import ImageTooLarge, ImageUnreadable, decode_image, verify_image
from megatron_vlm.data.shards.reader import ShardFolder
from tests.data.helpers import Folder, image_bytes, make_recipe, tiny_tokenizer_folder

SIZE = (12, 8)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, SIZE, colour)  # type: ignore[arg-type]


def half_transparent() -> Image.Image:
    image = flat("RGBA", (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 6, 8))
    return image


def transparent_palette() -> bytes:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 90, 60, 30])
    return encode(image, transparency=1)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((12, 8, 3), np.uint8)  # upright: width 12, height 8
    pixels[:6] = 255
    return encode(Image.fromarray(pixels), exif=exif)


def decompression_bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header says 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = {
    "rgb": (encode(flat("RGB", (1, 2, 3))), (1, 2, 3)),
    "grey": (encode(flat("L", 77)), (77, 77, 77)),
    "one bit": (encode(flat("1", 1)), (255, 255, 255)),
    "grey and alpha": (encode(flat("LA", (77, 0))), (255, 255, 255)),
    "palette": (encode(flat("RGB", (9, 99, 199)).convert("P", palette=Image.Palette.ADAPTIVE)), (9, 99, 199)),
    "transparent palette": (transparent_palette(), (255, 255, 255)),
    "alpha": (encode(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
    "16 bit": (encode(Image.fromarray(np.full((8, 12), 200 * 257, np.uint16))), (200, 200, 200)),
    "32 bit": (encode(Image.fromarray(np.full((8, 12), 5, np.int32)), "TIFF"), (0, 0, 0)),
    "cmyk": (encode(flat("CMYK", (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    "animated": (encode(flat("RGB", (0, 0, 255)), "GIF", save_all=True, append_images=[flat("RGB", (255, 0, 0))]),
                 (0, 0, 255)),
    "webp": (encode(flat("RGB", (50, 60, 70)), "WEBP", lossless=True), (50, 60, 70)),
    "exif": (rotated(), None),
    "half transparent": (encode(half_transparent()), None),
}  # fmt: skip
BAD = {
    "empty": (b"", "unreadable image"),
    "text": (b"this is no image", "unreadable image"),
    "html": (b"<!DOCTYPE html><html>404</html>", "unreadable image"),
    "truncated png": (image_bytes(90, 90)[:-900], "unreadable image"),
    "truncated jpeg": (image_bytes(90, 90, kind="JPEG")[:-900], "unreadable image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "unreadable image"),
    "no pixels": (decompression_bomb(0, 9), "unreadable image"),
    "more pixels than data": (decompression_bomb(900, 900), "unreadable image"),
    "bomb": (decompression_bomb(), "image too large"),
}


@pytest.mark.parametrize("name", GOOD)
def test_supported_formats(name: str) -> None:
    data, colour = GOOD[name]
    image = decode_image(data)
    assert image.mode == "RGB" and image.size == SIZE == verify_image(data)
    if colour is not None:
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1


def test_pixels_of_rotated_transparent_and_16_bit_images() -> None:
    upright = np.asarray(decode_image(GOOD["exif"][0]))
    assert upright[:, 6:].min() == 255 and upright[:, :6].max() == 0
    on_white = np.asarray(decode_image(GOOD["half transparent"][0]))
    assert on_white[:, :6].min() == 255 and (on_white[:, 6:] == (10, 20, 30)).all()
    ramp = np.linspace(0, 65535, 96, dtype=np.uint16).reshape(8, 12)
    scaled = np.asarray(decode_image(encode(Image.fromarray(ramp))))[..., 0].reshape(-1)
    assert scaled[0] == 0 and scaled[-1] == 255 and (np.diff(scaled.astype(int)) > 0).all()  # not clipped


@pytest.mark.parametrize("name", BAD)
def test_rejected_images(name: str) -> None:
    for read in (verify_image, decode_image):
        with pytest.raises(ImageUnreadable) as error:
            read(BAD[name][0])
    assert "object at" not in str(error.value)  # the message has no memory address: it is the same each time


def test_the_limit_is_the_number_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    with pytest.raises(ImageTooLarge, match="12x8 pixels"):
        verify_image(GOOD["rgb"][0])
    monkeypatch.setattr(images, "MAX_PIXELS", 96)
    assert verify_image(GOOD["rgb"][0]) == SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return add_samples(Folder(tmp_path))


def add_samples(folder: Folder) -> Folder:
    """Add one sample of each kind, valid and invalid."""
    for name, (data, _) in {**GOOD, **BAD}.items():
        (folder.images / name).write_bytes(data)
        folder.add(name, "<image>\nWhat?", "It.", image=name)
    folder.add("gone", "<image>\nWhat?", "It.", image="gone")
    folder.add("no placeholder", "What?", "It.", image="rgb")
    folder.add("two placeholders", "<image><image>What?", "It.", image="rgb")
    folder.add("wrong role", "hi", "yes")
    folder.entries[-1]["conversations"][1]["from"] = "tool"
    folder.add("empty answer", "hi", " ")
    folder.add("no answer", "hi")
    folder.add("two questions", "hi", "yes")
    folder.entries[-1]["conversations"].insert(0, {"from": "human", "value": "hello"})
    folder.add("no text", "hi", "yes")
    folder.entries[-1]["conversations"][0]["value"] = 7
    folder.add("no character", "hi \ud800", "yes")
    folder.add("no name", "<image>\nWhat?", "It.", image="a\0b")
    folder.add("folder", "<image>\nWhat?", "It.", image="folder")
    (folder.images / "folder").mkdir()
    folder.add("video", "hi", "yes", video="a.mp4")
    folder.entries += ["not an entry", {"id": "bare"}]
    return folder


REASONS = {
    **{name: reason for name, (_, reason) in BAD.items()},
    "gone": "missing image", "no placeholder": "image count mismatch", "two placeholders": "image count mismatch",
    "wrong role": "unknown role", "empty answer": "empty answer", "no answer": "no answer",
    "two questions": "turns out of order", "no text": "no text", "no character": "no text",
    "no name": "bad image path", "folder": "unreadable image", "video": "video",
    "bare": "no conversation", f"#{len(GOOD) + len(BAD) + 12}": "not an entry",
}  # fmt: skip


def test_prepare_shards(folder: Folder, tmp_path: Path) -> None:
    summary = prepare_shards([folder.write()], folder.images, tmp_path / "s", 1)
    listed = [json.loads(line) for line in (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()]
    assert {item["id"]: item["reason"] for item in listed} == REASONS
    assert summary.read == len(folder.entries) == summary.written + len(listed)
    shards = ShardFolder(tmp_path / "s")
    for index, (name, (data, _)) in enumerate(GOOD.items()):
        assert shards[index].annotation["id"] == name and shards[index].images == [data]


def test_training_loader(folder: Folder, tmp_path: Path) -> None:
    recipe = make_recipe(folder.write(), folder.images, tiny_tokenizer_folder(tmp_path / "t"), global_batch_size=1)
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    batches = [next(loader) for _ in range(loader.plan.rows)]
    assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(GOOD)
    assert all(batch.tiles is not None and len(batch.tiles) == batch.num_tiles for batch in batches)
    rejected = loader.summary()["rejected"]
    assert rejected == {reason: list(REASONS.values()).count(reason) for reason in REASONS.values()}
