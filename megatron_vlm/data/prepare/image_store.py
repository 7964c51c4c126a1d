"""The image files of a converted dataset."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlm.data.prepare.cells import is_missing
from megatron_vlm.data.prepare.tables import RowError
from megatron_vlm.data.processing.image_io import ImageTooLarge, ImageUnreadable, verify_image
from megatron_vlm.data.sources.annotations import is_url
from megatron_vlm.data.sources.message_formats import shown

_MIN_BASE64_LENGTH = 60
_MAX_PATH_LENGTH = 250
_MAX_REMEMBERED = 100_000


class ImageStore:
    """The folder with the image files of the converted dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, cell: Any) -> str:
        """The path, relative to the folder, of the image in a cell. Image bytes are written unchanged.

        Args:
            cell: a path relative to the folder, the bytes of an image file (raw or Base64), or Hugging Face's
                {bytes, path}.

        Raises:
            RowError: the file does not exist, or the bytes are not an image.
        """
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and len(cell) > _MIN_BASE64_LENGTH and not self._exists(cell):
            with suppress(binascii.Error, ValueError):  # not Base64: treat it as a path
                cell = base64.b64decode(cell.rpartition(",")[2], validate=True)  # a data: URL has a comma
        if isinstance(cell, bytes):
            return self._write(cell)
        if not isinstance(cell, str) or not cell.strip():
            raise RowError("no image", f"{shown(cell)} is neither bytes nor a path")
        if is_url(cell):
            raise RowError("image is a URL", f"{shown(cell)}: download it, and give the path of the file")
        if not self._exists(cell):
            raise RowError("missing image", f"{self.folder / cell[:_MAX_PATH_LENGTH]} does not exist")
        self.verify(cell)
        return cell

    def take_all(self, cell: Any) -> list[str]:
        """Like `take`, for a cell that may be empty or hold a list of images."""
        if isinstance(cell, dict) and not any(cell.values()):  # Hugging Face's empty image
            cell = None
        if is_missing(cell):
            return []
        return [self.take(image) for image in (cell if isinstance(cell, list) else [cell])]

    def verify(self, path: str) -> None:
        """Decode the image file at a path below the folder, once.

        Raises:
            RowError: it is missing or unreadable.
        """
        if path in self._verified:
            return
        try:
            data = (self.folder / path).read_bytes()
        except (OSError, ValueError) as error:
            raise RowError("missing image", f"{self.folder / path}: {error}") from error
        self._decode(data, path)
        self._remember(path)

    def _decode(self, data: bytes, name: str) -> None:
        try:
            verify_image(data)
        except ImageUnreadable as error:
            reason = "image too large" if isinstance(error, ImageTooLarge) else "unreadable image"
            raise RowError(reason, f"{name}: {error}") from error

    def _remember(self, path: str) -> None:
        if len(self._verified) >= _MAX_REMEMBERED:  # rows of an image are usually near each other
            self._verified.clear()
        self._verified.add(path)

    def _exists(self, path: str) -> bool:
        try:
            return len(path) < _MAX_PATH_LENGTH and (self.folder / path).is_file()
        except ValueError:  # a NUL or a lone surrogate
            return False

    def _write(self, data: bytes) -> str:
        self._decode(data, f"image of {len(data)} bytes")
        with Image.open(io.BytesIO(data)) as image:
            suffix = (image.format or "bin").lower()
        name = hashlib.sha256(data).hexdigest()[:32]  # identical images share a file
        path = Path(name[:2], f"{name}.{suffix}")
        (self.folder / path).parent.mkdir(exist_ok=True)
        if not (self.folder / path).exists():
            (self.folder / path).write_bytes(data)
        self._remember(str(path))
        return str(path)
