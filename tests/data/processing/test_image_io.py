"""Images are decoded upright; damage is detected."""

from __future__ import annotations

import pytest
from PIL import Image

from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image, verify_image
from tests.data.helpers import image_bytes


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_size_and_mode(format: str) -> None:
    data = image_bytes(50, 30, kind=format)
    assert verify_image(data) == (50, 30)
    assert decode_image(data).size == (50, 30) and decode_image(data).mode == "RGB"


@pytest.mark.parametrize(("orientation", "size"), [(1, (300, 200)), (3, (300, 200)), (6, (200, 300)), (8, (200, 300))])
def test_exif_orientation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes(300, 200, kind="JPEG", exif=exif)
    assert verify_image(data) == decode_image(data).size == size


@pytest.mark.parametrize(
    "data", [b"", b"no image", image_bytes(90, 90)[:2000], image_bytes(90, 90, kind="JPEG")[:2000]]
)
def test_damage_is_detected(data: bytes) -> None:
    with pytest.raises(ImageUnreadable):
        verify_image(data)
    with pytest.raises(ImageUnreadable):
        decode_image(data)
