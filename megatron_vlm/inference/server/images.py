"""Images of requests: data URLs, and what is fetched, to decoded images within the limits."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence

from PIL import Image

from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image
from megatron_vlm.inference.server.errors import ApiError
from megatron_vlm.inference.server.fetch import fetch_all
from megatron_vlm.inference.server.settings import ServerSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of the many that Pillow reads, those that people send; each decoder less is one that nobody can attack."""


def is_remote(url: str) -> bool:
    return url[:8].lower().startswith(("http://", "https://"))


async def load_images(urls: Sequence[tuple[str, str]], settings: ServerSettings) -> Callable[[], list[Image.Image]]:
    """Fetch what has to be fetched.

    Args:
        urls: (field of the request, address) of each image.

    Returns:
        A function that decodes the images, for a thread. It raises ApiError, too.

    Raises:
        ApiError: too many images, an address that is not accepted, or one that gives no image.
    """
    if len(urls) > settings.max_images:
        raise ApiError(400, f"The request has {len(urls)} images, but at most {settings.max_images} are accepted.")
    for where, url in urls:
        _check_url(url, settings, where)
    fetched = await fetch_all([(where, url) for where, url in urls if is_remote(url)], settings)
    return lambda: decode_images(
        [(where, fetched[where] if where in fetched else _decode_data_url(url, where)) for where, url in urls],
        settings,
    )


def _check_url(url: str, settings: ServerSettings, where: str) -> None:
    """Raise ApiError (400) if an image's address is of a kind that is not accepted."""
    if is_remote(url):
        if not settings.allow_remote_images:
            raise ApiError(
                400,
                f"{where}: this server fetches no images from the network. Send the image itself as a data URL, or "
                "start the server with --allow-remote-images.",
                param=where,
            )
    elif url[:5].lower() != "data:":
        raise ApiError(
            400, f"{where}: an image is a data URL, such as data:image/png;base64,..., not {url[:40]!r}", param=where
        )


def _decode_data_url(url: str, where: str) -> bytes:
    """The bytes of `data:image/png;base64,...`; raises ApiError (400) if it is anything else."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(
            400, f"{where}: a data URL begins like data:image/png;base64, but this one does not", param=where
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: the data URL is not valid base64 ({error})", param=where) from error


def decode_images(files: Sequence[tuple[str, bytes]], settings: ServerSettings) -> list[Image.Image]:
    """Decode the images of a request.

    Args:
        files: (where it is in the request, its bytes) of each.

    Raises:
        ApiError: one is no image, or all together have too many pixels.
    """
    images: list[Image.Image] = []
    left = settings.max_image_pixels
    for where, data in files:
        try:
            images.append(decode_image(data, max_pixels=left, formats=FORMATS))
        except ImageUnreadable as error:
            raise ApiError(400, f"{where}: the image cannot be read: {error}", param=where) from error
        left -= images[-1].width * images[-1].height
    return images
