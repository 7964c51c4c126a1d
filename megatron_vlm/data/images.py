"""Image files: their size as a person sees them, their pixels, and whether they are whole."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # documents are scanned at resolutions that Pillow takes for an attack

_ROTATED = {5, 6, 7, 8}
"""EXIF orientations that swap width and height."""
_EXIF_ORIENTATION = 0x0112


class ImageUnreadable(Exception):
    """The bytes are no image that can be decoded."""


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _ROTATED else (width, height)


def verify_image(data: bytes) -> tuple[int, int]:
    """Decode an image whole and return its upright (width, height).

    JPEGs are decoded at reduced resolution where possible, which still reads every byte, so a truncated or damaged file
    is found.

    Raises:
        ImageUnreadable: with what is wrong.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = _upright_size(image)
            image.draft(image.mode, (64, 64))
            image.load()
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
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ImageUnreadable(_explain(data, error)) from error


def _explain(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    return f"{len(data)} bytes that Pillow cannot decode ({type(error).__name__}: {error})".replace("\n", " ")
