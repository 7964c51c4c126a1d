"""Reads the rows of tables in several file formats."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_vlm.data.errors import DataError

_MAX_CELL_LENGTH = 1 << 30
"""Base64 images are far longer than the csv module's default limit."""
_GZIP = ".gz"


class RowError(Exception):
    """A row that cannot be converted. `reason` is one of a fixed set, so that errors can be counted by it."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason = reason


Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row | RowError]:
    """Yield the rows of a `.json` (a list), `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.parquet` file.

    All but `.json` are streamed. All but `.parquet` may be compressed with gzip (`.jsonl.gz`). A row that cannot be
    read is yielded as its error.

    Raises:
        DataError: the file cannot be read or has another suffix.
    """
    suffix = Path(path.stem).suffix if path.suffix == _GZIP else path.suffix
    reader = _READERS.get(suffix)
    if reader is None or (reader is _parquet and path.suffix == _GZIP):
        expected = f"{', '.join(_READERS)}, or all but .parquet with {_GZIP}"
        raise DataError(f"{path}: expected a file ending in {expected}")
    try:
        yield from reader(path)
    except RecursionError:
        raise DataError(f"{path} cannot be read: it is nested too deeply") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    except (ValueError, csv.Error, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Check that it is whole.") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == _GZIP else path.open("rb")


def _as_row(value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return value
    return RowError("no row", f"expected an object, got {type(value).__name__}")


def _json(path: Path) -> Iterator[Row | RowError]:
    with _open(path) as file:
        rows = json.loads(file.read())
    if isinstance(rows, dict):
        lists = [str(key) for key, value in rows.items() if isinstance(value, list)]
        hint = f"; save its list {' or '.join(lists)} as a file" if lists else ""
        raise ValueError(f"expected a list of rows, got an object{hint}")
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of rows, got {type(rows).__name__}")
    yield from map(_as_row, rows)


def _jsonl(path: Path) -> Iterator[Row | RowError]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
                except (ValueError, RecursionError) as error:
                    yield RowError("not JSON", f"line {number}: {error}")
                else:
                    yield _as_row(row)


def _csv(path: Path) -> Iterator[Row | RowError]:
    csv.field_size_limit(_MAX_CELL_LENGTH)
    with _open(path) as data, io.TextIOWrapper(data, "utf-8-sig", newline="") as file:  # Excel writes a byte-order mark
        delimiter = "\t" if ".tsv" in path.suffixes else ","
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            if None in row:
                cells = len(row) - 1 + len(row[None])
                what = f"line {reader.line_num} has {cells} cells for {len(row) - 1} columns"
                yield RowError("too many cells", f"{what}: quote cells with {delimiter!r}")
            else:
                yield row


def _parquet(path: Path) -> Iterator[Row | RowError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'megatron-vlm[parquet]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):  # rows with images are large
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read: {error}. Check that it is whole.") from error


_READERS = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
