"""The encodings of shards written by the published Instella-VL code.

The columns are `image` and `text`. `text` is the annotation. `image` is one JPEG file (encoding `jpeg:<quality>`) or
several (encoding `jpeg_list`: for each image a 3-byte big-endian length and the file). Text-only samples hold a
placeholder image of one pixel, so the annotation decides whether a sample has an image.

mosaicml-streaming has neither encoding. They are registered in its table of encodings at import; its files are not
changed.
"""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

COLUMNS = {"image", "text"}
_LENGTH_BYTES = 3
_DEFAULT_QUALITY = 75


def is_image(encoding: str) -> bool:
    """Whether the column holds one image file per sample."""
    return encoding.partition(":")[0] in ("jpeg", "png")


def is_jpeg_list(encoding: str) -> bool:
    """Whether the column holds a list of image files per sample."""
    return encoding.partition(":")[0] == "jpeg_list"


def split_jpeg_list(data: bytes) -> list[bytes]:
    """The image files of a `jpeg_list`.

    Raises:
        ValueError: a length points beyond the end.
    """
    images: list[bytes] = []
    end = 0
    while end < len(data):
        start = end + _LENGTH_BYTES
        end = start + int.from_bytes(data[end:start], "big")
        if end > len(data):
            raise ValueError(f"image {len(images)} of a jpeg_list ends at byte {end} of {len(data)}")
        images.append(data[start:end])
    return images


def join_jpeg_list(images: list[bytes]) -> bytes:
    """The inverse of `split_jpeg_list`."""
    return b"".join(len(image).to_bytes(_LENGTH_BYTES, "big") + image for image in images)


def register_encodings() -> None:
    """Register both encodings with mosaicml-streaming in this process."""
    from streaming.base.format.mds import encodings

    if "jpeg_list" in encodings._encodings:
        return

    class JpegOfQuality(encodings.JPEG):  # type: ignore[misc]
        """`jpeg` or `jpeg:<quality>`. Both are decoded alike."""

        def __init__(self, quality: int = _DEFAULT_QUALITY) -> None:
            self.quality = quality

        @classmethod
        def from_str(cls, text: str) -> JpegOfQuality:
            if not text.isdigit() or int(text) > 100:
                raise ValueError(f"jpeg:{text}: quality must be a number from 0 to 100")
            return cls(int(text))

        def encode(self, obj: Image.Image) -> bytes:
            if not isinstance(obj, Image.Image):
                raise TypeError(f"expected a PIL image, got {type(obj).__name__}")
            source = getattr(obj, "filename", "")
            if obj.format == "JPEG" and source:  # as mosaicml-streaming does: keep the bytes of the file
                with open(source, "rb") as file:
                    return file.read()
            out = io.BytesIO()
            obj.save(out, "JPEG", quality=self.quality)
            return out.getvalue()

    class JpegList(JpegOfQuality):
        """`jpeg_list` or `jpeg_list:<quality>`."""

        def encode(self, obj: Any) -> bytes:
            return join_jpeg_list([super(JpegList, self).encode(image) for image in obj])

        def decode(self, data: bytes) -> list[Image.Image]:
            return [super(JpegList, self).decode(image) for image in split_jpeg_list(data)]

    encodings._encodings.update({"jpeg": JpegOfQuality, "jpeg_list": JpegList})
