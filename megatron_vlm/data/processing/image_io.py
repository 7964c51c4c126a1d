"""Decodes and verifies image files. Sizes are those of the upright image.

How each format is handled:

| image | handling |
|-------|----------|
| EXIF orientation | rotated upright |
| palette, greyscale, 1 bit, CMYK | converted to RGB |
| alpha channel or transparent colour | composited on white |
| 16-bit or 32-bit greyscale | scaled to 8 bits: 16 bits by 1/257, others by their range (Pillow would clip) |
| animated | first frame |
| more than MAX_PIXELS | rejected before decoding |
| truncated, damaged, empty | rejected |
| PostScript | rejected: it is a program, and Pillow would start Ghostscript to run it |
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 300_000_000
"""An A1 scan at 600 dpi has 280 million pixels. Decoded, an image of this size takes 0.9 GB."""
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit of 89 million would reject large scans; MAX_PIXELS replaces it

_ROTATED = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255)


class ImageUnreadable(Exception):
    """The bytes cannot be decoded as an image."""


class ImageTooLarge(ImageUnreadable):
    """The image has too many pixels, according to its header."""


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _ROTATED else (width, height)


def _check(image: Image.Image, max_pixels: int | None = None) -> None:
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if image.format == "EPS":
        raise ImageUnreadable("PostScript is not supported: it is a program, not an image")
    if image.width * image.height > max_pixels:
        raise ImageTooLarge(
            f"{image.width}x{image.height} pixels, more than {max_pixels / 10**6:.4g} million: not decoded, since a "
            "small file can claim any size"
        )


def verify_image(data: bytes) -> tuple[int, int]:
    """Decode all of an image and return its upright (width, height).

    JPEGs are decoded at reduced resolution where possible. Every byte is still read, so a truncated or damaged file is
    detected.

    Raises:
        ImageUnreadable: the image cannot be decoded, or is not supported.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check(image)
            size = _upright_size(image)
            image.draft(image.mode, (64, 64))
            image.load()
    except ImageUnreadable:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise ImageUnreadable(_explain(data, error)) from error
    return size


def measure_image(file: BinaryIO) -> tuple[int, int]:
    """Upright (width, height) of an image, from its header if the file is whole by its format's own marks.

    A file that lacks them, or whose format has none, is decoded: it may be truncated. Damage between the marks is not
    found.

    Args:
        file: seekable, at its start.

    Raises:
        ImageUnreadable: the image cannot be decoded, or is not supported.
    """
    try:
        if _is_whole(file):
            file.seek(0)
            with Image.open(file) as image:
                _check(image)
                if image.format == "PNG" and not _ORIENTATION_KEYS & image.info.keys():
                    return image.size  # Pillow would decode it to look for more
                return _upright_size(image)
    except ImageUnreadable:
        raise
    except Exception:  # Pillow's decoders raise many types; decoding says what is wrong
        pass
    file.seek(0)
    return verify_image(file.read())


_TAIL = 64
_PNG_SIGNATURE, _PNG_CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">I4s")
_MAX_PNG_CHUNKS = 10_000
_PNG_HEADER, _PNG_CHANNELS = struct.Struct(">IIBB"), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_MAX_DEFLATE = 1032
"""Bytes that a byte of deflated data can hold at most."""
_PNG_TEXTS, _PNG_PROFILES = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type", b"XML:com.adobe.xmp")
_ORIENTATION_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
"""Of a Pillow image's `info`."""


def _is_whole(file: BinaryIO) -> bool:
    """Whether a JPEG, PNG or WebP file ends as its format says, and is not truncated."""
    head = file.read(12)
    length = file.seek(0, io.SEEK_END)
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(max(length - _TAIL, 0))
        return file.read().rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return int.from_bytes(head[4:8], "little") + 8 <= length
    return head.startswith(_PNG_SIGNATURE) and _png_is_whole(file, length)


def _png_is_whole(file: BinaryIO, length: int) -> bool:
    """Whether the chunks of a PNG end with IEND and can hold its pixels, and an orientation precedes the pixels."""
    position, raw, compressed = len(_PNG_SIGNATURE), 0, 0
    for _ in range(_MAX_PNG_CHUNKS):
        file.seek(position)
        header = file.read(_PNG_CHUNK.size)
        if len(header) < _PNG_CHUNK.size:
            return False
        size, kind = _PNG_CHUNK.unpack(header)
        position += _PNG_CHUNK.size + size + 4  # a checksum follows
        if kind == b"IHDR":
            width, height, depth, colour = _PNG_HEADER.unpack(file.read(_PNG_HEADER.size))
            raw = height * (1 + width * depth * _PNG_CHANNELS.get(colour, 1) // 8)
        elif kind == b"IDAT":
            compressed += size
        elif compressed and (kind == b"eXIf" or (kind in _PNG_TEXTS and file.read(_TAIL).startswith(_PNG_PROFILES))):
            return False  # decoding reads an orientation that comes so late
        if kind == b"IEND":
            return position <= length and 0 < raw <= compressed * _MAX_DEFLATE
    return False


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode an image to RGB, rotated upright.

    Args:
        data: a whole file.
        max_pixels: nothing larger is decoded.
        formats: Pillow's names of the formats that are tried; None: all.

    Raises:
        ImageUnreadable: the image cannot be decoded, or is not supported.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check(image, max_pixels)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except ImageUnreadable:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise ImageUnreadable(_explain(data, error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as training sees it: rotated upright, in RGB. The argument stays as it is."""
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_to_eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, _WHITE)
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies


def _grey_to_eight_bits(image: Image.Image) -> Image.Image:
    """From mode `I;16`, `I` (also a 16-bit PNG in older Pillow) or `F`."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 and high <= 65535 and image.mode.startswith("I"):
        scaled = pixels / 257
    else:
        scaled = (pixels - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def _explain(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"{len(data)} bytes that start with {data[:12]!r}, which is no image format that Pillow knows"
    return f"{len(data)} bytes that Pillow cannot decode ({type(error).__name__}: {error})".replace("\n", " ")
