"""Reads the rows of tables in several file formats, and stores the images in their cells as files."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.image_io import ImageUnreadable, verify_image

_MIN_BASE64_LENGTH = 60
_MAX_PATH_LENGTH = 250
_MAX_CELL_LENGTH = 1 << 30
"""Base64 images are far longer than the csv module's default limit."""


class RowError(Exception):
    """A row that cannot be converted. `reason` is one of a fixed set, so that errors can be counted by it."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason = reason


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `.json` (a list), `.jsonl`, `.csv`, `.tsv` or `.parquet` file. All but `.json` are streamed.

    Raises:
        DataError: the file cannot be read or has another suffix.
    """
    try:
        yield from _READERS[path.suffix](path)
    except KeyError:
        raise DataError(f"{path}: expected a file ending in {', '.join(_READERS)}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> Iterator[dict[str, Any]]:
    rows = json.loads(path.read_bytes())
    if not isinstance(rows, list):
        raise ValueError(f"expected a list, got {type(rows).__name__}")
    yield from rows


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_MAX_CELL_LENGTH)
    with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte-order mark
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):  # rows with images are large
        yield from batch.to_pylist()


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


class ImageStore:
    """The folder with the image files of the converted dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            with suppress(binascii.Error):  # not Base64: treat it as a path
                cell = base64.b64decode(cell.rpartition(",")[2], validate=True)  # a data: URL has a comma
        if isinstance(cell, bytes):
            return self._write(cell)
        if not isinstance(cell, str) or not cell:
            raise RowError("no image", f"{cell!r} is neither bytes nor a path")
        if not self._exists(cell):
            raise RowError("missing image", f"{self.folder / cell} does not exist")
        return cell

    def take_all(self, cell: Any) -> str | list[str] | None:
        """Like `take`, for a cell that may be empty or hold a list of images."""
        if cell is None or cell == "" or cell == []:
            return None
        if isinstance(cell, list):
            paths = [self.take(image) for image in cell]
            return paths if len(paths) > 1 else paths[0]
        return self.take(cell)

    def _exists(self, path: str) -> bool:
        return len(path) < _MAX_PATH_LENGTH and (self.folder / path).is_file()

    def _write(self, data: bytes) -> str:
        try:
            verify_image(data)
            with Image.open(io.BytesIO(data)) as image:
                suffix = (image.format or "bin").lower()
        except ImageUnreadable as error:
            raise RowError("unreadable image", str(error)) from error
        name = hashlib.sha256(data).hexdigest()[:32]  # identical images share a file
        path = Path(name[:2], f"{name}.{suffix}")
        (self.folder / path).parent.mkdir(exist_ok=True)
        if not (self.folder / path).exists():
            (self.folder / path).write_bytes(data)
        return str(path)
