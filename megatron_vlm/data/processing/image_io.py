"""Image files: their size as a person sees them, their pixels, and whether they are whole.

What becomes of each kind, on purpose:

| kind | becomes |
|------|---------|
| EXIF orientation | turned upright; sizes are those of the upright image |
| palette, grey, 1 bit, CMYK | RGB |
| alpha, or a transparent colour | laid on white, as a page or a screen shows it |
| 16 or 32 bits of grey | scaled to 8 bits: 16 bits by 257, others by their own range; Pillow's own conversion clips |
| animated | its first frame |
| more than MAX_PIXELS | refused before anything is decoded |
| truncated, damaged, empty | refused |
| PostScript | refused: it is a program, which Pillow would have Ghostscript run |
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 300_000_000
"""A scan of A1 at 600 dots per inch has 280 million. Decoded, an image of this size takes 0.9 GB."""
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, 89 million, takes large scans for an attack; ours is looked at here

_ROTATED = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255)


class ImageUnreadable(Exception):
    """The bytes are no image that can be decoded."""


class ImageTooLarge(ImageUnreadable):
    """An image of more than MAX_PIXELS: a few kilobytes can claim any size."""


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _ROTATED else (width, height)


def _check(image: Image.Image) -> None:
    if image.format == "EPS":
        raise ImageUnreadable("PostScript, which is a program and no picture")
    if image.width * image.height > MAX_PIXELS:
        raise ImageTooLarge(
            f"{image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} million: not decoded, for a small "
            "file may claim any size"
        )


def verify_image(data: bytes) -> tuple[int, int]:
    """Decode an image whole and return its upright (width, height).

    JPEGs are decoded at reduced resolution where possible, which still reads every byte, so a truncated or damaged file
    is found.

    Raises:
        ImageUnreadable: with what is wrong.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check(image)
            size = _upright_size(image)
            image.draft(image.mode, (64, 64))
            image.load()
    except ImageUnreadable:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ImageUnreadable(_explain(data, error)) from error
    return size


def decode_image(data: bytes) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation.

    Raises:
        ImageUnreadable: with what is wrong.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except ImageUnreadable:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ImageUnreadable(_explain(data, error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_to_eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, _WHITE)
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _grey_to_eight_bits(image: Image.Image) -> Image.Image:
    """`I;16`, `I` (a 16-bit PNG, in older Pillow), or `F`."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 and high <= 65535 and image.mode.startswith("I"):
        eight = pixels / 257
    else:
        eight = (pixels - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.round(eight).astype(np.uint8))


def _explain(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"{len(data)} bytes that begin {data[:12]!r} and are of no kind that Pillow knows"
    return f"{len(data)} bytes that Pillow cannot decode ({type(error).__name__}: {error})".replace("\n", " ")
