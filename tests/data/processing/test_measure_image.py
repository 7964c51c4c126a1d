"""Sizes from headers are those of decoding, and a file that may be truncated is decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megatron_vlm.data.processing import image_io
from megatron_vlm.data.processing.image_io import ImageUnreadable, measure_image, verify_image

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'


def encode(kind: str, **save: object) -> bytes:
    stream = io.BytesIO()
    PIXELS.save(stream, kind, **save)
    return stream.getvalue()


def png_with_late_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk after the pixels, before IEND."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = encode("PNG")
    return png[:-12] + chunk + png[-12:]


def png_text(key: str, text: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    return info


HEADER_ONLY = {
    "jpeg": encode("JPEG"),
    "progressive jpeg": encode("JPEG", progressive=True),
    "padded jpeg": encode("JPEG") + bytes(20),
    "rotated jpeg": encode("JPEG", exif=EXIF),
    "png": encode("PNG"),
    "png with a date at its end": png_with_late_chunk(b"tEXt", b"date:create\0 2020-01-01"),
    "webp": encode("WEBP"),
    "rotated webp": encode("WEBP", exif=EXIF),
}
DECODED = {
    "rotated png": encode("PNG", exif=EXIF),
    "png rotated at its end": png_with_late_chunk(b"eXIf", EXIF.tobytes()[6:]),
    "png rotated by xmp": encode("PNG", pnginfo=png_text("XML:com.adobe.xmp", XMP.decode())),
    "jpeg with more behind it": encode("JPEG") + b"and more",
    "gif": encode("GIF"),
    "bmp": encode("BMP"),
    "tiff": encode("TIFF"),
}


@pytest.mark.parametrize("name", [*HEADER_ONLY, *DECODED])
def test_sizes_are_those_of_decoding(name: str) -> None:
    data = (HEADER_ONLY | DECODED)[name]
    assert measure_image(io.BytesIO(data)) == verify_image(data) == ((30, 50) if "rotated" in name else (50, 30))


@pytest.mark.parametrize("name", HEADER_ONLY)
def test_whole_files_are_not_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_io, "verify_image", lambda data: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    measure_image(io.BytesIO(HEADER_ONLY[name]))


@pytest.mark.parametrize("name", [*HEADER_ONLY, *DECODED])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_rejected_as_before(name: str, kept: float) -> None:
    data = (HEADER_ONLY | DECODED)[name]
    truncated = data[: int(len(data) * kept)]
    try:
        expected: object = verify_image(truncated)
    except ImageUnreadable as error:
        expected = str(error)
    try:
        got: object = measure_image(io.BytesIO(truncated))
    except ImageUnreadable as error:
        got = str(error)
    assert got == expected


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xd9", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_other_files_are_rejected(data: bytes) -> None:
    with pytest.raises(ImageUnreadable):
        measure_image(io.BytesIO(data))
