"""Shards as the published Instella-VL system wrote them, readable here and by mosaicml-streaming itself.

Columns `image` and `text`: `text` is the annotation, `image` a JPEG, encoding `jpeg:<quality>`, or several, encoding
`jpeg_list`: each a length of 3 bytes, big-endian, and the file. The writer put a placeholder image of one pixel into
samples of text alone; whether a sample has an image is told by its annotation.

mosaicml-streaming knows neither encoding. They are added to its table of encodings at import; no file of it is changed.
"""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

COLUMNS = {"image", "text"}
_LENGTH_BYTES = 3
_DEFAULT_QUALITY = 75


def is_image(encoding: str) -> bool:
    """One image file per sample."""
    return encoding.partition(":")[0] in ("jpeg", "png")


def is_jpeg_list(encoding: str) -> bool:
    """Several image files per sample."""
    return encoding.partition(":")[0] == "jpeg_list"


def split_jpeg_list(data: bytes) -> list[bytes]:
    """The image files of a `jpeg_list`.

    Raises:
        ValueError: a length points beyond the end.
    """
    images: list[bytes] = []
    place = 0
    while place < len(data):
        start = place + _LENGTH_BYTES
        place = start + int.from_bytes(data[place:start], "big")
        if place > len(data):
            raise ValueError(f"image {len(images)} of a jpeg_list ends at {place} of {len(data)} bytes")
        images.append(data[start:place])
    return images


def join_jpeg_list(images: list[bytes]) -> bytes:
    """The inverse of `split_jpeg_list`."""
    return b"".join(len(image).to_bytes(_LENGTH_BYTES, "big") + image for image in images)


def register_encodings() -> None:
    """Teach mosaicml-streaming of this process the two encodings."""
    from streaming.base.format.mds import encodings

    if "jpeg_list" in encodings._encodings:
        return

    class JpegOfQuality(encodings.JPEG):  # type: ignore[misc]
        """`jpeg`, or `jpeg:<quality>`; read alike."""

        def __init__(self, quality: int = _DEFAULT_QUALITY) -> None:
            self.quality = quality

        @classmethod
        def from_str(cls, text: str) -> JpegOfQuality:
            if not text.isdigit() or int(text) > 100:
                raise ValueError(f"jpeg:{text}: quality is a number from 0 to 100")
            return cls(int(text))

        def encode(self, obj: Image.Image) -> bytes:
            if not isinstance(obj, Image.Image):
                raise TypeError(f"an image is expected, not {type(obj).__name__}")
            source = getattr(obj, "filename", "")
            if obj.format == "JPEG" and source:  # as the library does: the file's own bytes
                with open(source, "rb") as file:
                    return file.read()
            out = io.BytesIO()
            obj.save(out, "JPEG", quality=self.quality)
            return out.getvalue()

    class JpegList(JpegOfQuality):
        """`jpeg_list`, or `jpeg_list:<quality>`."""

        def encode(self, obj: Any) -> bytes:
            return join_jpeg_list([super(JpegList, self).encode(image) for image in obj])

        def decode(self, data: bytes) -> list[Image.Image]:
            return [super(JpegList, self).decode(image) for image in split_jpeg_list(data)]

    encodings._encodings.update({"jpeg": JpegOfQuality, "jpeg_list": JpegList})
