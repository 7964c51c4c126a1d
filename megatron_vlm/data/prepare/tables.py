"""Rows of a table, whatever it is kept in, and image files for what its cells hold."""

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

_BASE64_AT_LEAST = 60
_LONGEST_PATH = 250
_LONGEST_CELL = 1 << 30
"""Images as Base64 are far longer than the csv module allows by default."""


class RowError(Exception):
    """A row that cannot be converted; `reason` is one of a few, so that rows can be counted by it."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason = reason


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.json` (a list), `.jsonl`, `.csv`, `.tsv` or `.parquet` file, one at a time where the format allows.

    Raises:
        DataError: it cannot be read, or is none of these.
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
        raise ValueError(f"it holds a {type(rows).__name__}, not a list")
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
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a mark before the first column's name
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} is read with pyarrow: pip install pyarrow") from error
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):  # rows with images are large
        yield from batch.to_pylist()


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


class ImageStore:
    """The folder that image files of the converted set lie in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, cell: Any) -> str:
        """The path, below the folder, of the image in a cell; its bytes are kept as they are.

        Args:
            cell: a path below the folder; the bytes of a file, as Base64 or in Hugging Face's {bytes, path} too.

        Raises:
            RowError: there is no such file, or the bytes are no image.
        """
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and len(cell) > _BASE64_AT_LEAST and not self._has(cell):
            with suppress(binascii.Error):  # a path, if it is none
                cell = base64.b64decode(cell.rpartition(",")[2], validate=True)  # a data: URL has a comma
        if isinstance(cell, bytes):
            return self._keep(cell)
        if not isinstance(cell, str) or not cell:
            raise RowError("no image", f"{cell!r} is neither bytes nor a path")
        if not self._has(cell):
            raise RowError("missing image", f"there is no {self.folder / cell}")
        return cell

    def take_all(self, cell: Any) -> str | list[str] | None:
        """As `take`, of a cell that may be empty, or hold a list of images."""
        if cell is None or cell == "" or cell == []:
            return None
        if isinstance(cell, list):
            taken = [self.take(one) for one in cell]
            return taken if len(taken) > 1 else taken[0]
        return self.take(cell)

    def _has(self, path: str) -> bool:
        return len(path) < _LONGEST_PATH and (self.folder / path).is_file()

    def _keep(self, data: bytes) -> str:
        try:
            verify_image(data)
            with Image.open(io.BytesIO(data)) as image:
                suffix = (image.format or "bin").lower()
        except ImageUnreadable as error:
            raise RowError("unreadable image", str(error)) from error
        name = hashlib.sha256(data).hexdigest()[:32]  # the same image twice is one file
        path = Path(name[:2], f"{name}.{suffix}")
        (self.folder / path).parent.mkdir(exist_ok=True)
        if not (self.folder / path).exists():
            (self.folder / path).write_bytes(data)
        return str(path)
