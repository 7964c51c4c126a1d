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


def _check(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
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
