"""Annotation files of which only byte offsets are in memory."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.config.errors import nearest
from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.sources.json_index import find_items, find_lines
from megatron_vlm.runtime.file_lock import file_lock

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES)
"""Of annotation files."""
_MIN_CACHED_BYTES = 1 << 20
"""A smaller file is scanned in milliseconds."""
_BLOCK = 1 << 24


@dataclass
class _Scan:
    """What one pass over a file finds."""

    offsets: np.ndarray
    """[n, 2] int64: where each entry starts and ends."""
    state: np.ndarray
    """[2] int64: size and modification time (ns) of the file."""
    digest: str = ""
    """sha256 of the file in hex; empty until it is needed."""


class AnnotationFile:
    """The entries of one `.json` (a list), `.jsonl` or `.ndjson` file. Only their byte offsets are held in memory.

    An entry is read from disk on access. Millions of parsed entries would take gigabytes in every rank, whereas the
    page cache is shared by all ranks and workers of a node.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        """Index the entries, or read their offsets from the cache.

        Args:
            path: the file.
            cache_dir: where the offsets of a large file are kept; None: they are not.

        Raises:
            DataError: the file is missing, is not a list of entries, or is empty.
        """
        self.path = Path(path)
        self._cache = Path(cache_dir) if cache_dir else None
        try:
            with self.path.open("rb") as file:
                self._scan = self._read_cache(file) or self._scan_once(file)
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            what = f"annotation file {self.path} cannot be read: {error.strerror}"
            raise DataError(f"{what}. {_remedy(self.path)}") from error
        except RecursionError:
            raise DataError(f"annotation file {self.path} is nested too deeply. Write a list of entries.") from None
        except ValueError as error:
            what = str(error).rstrip(".")
            raise DataError(f"annotation file {self.path} {what}. Fix the file, or write it again.") from error
        weakref.finalize(self, os.close, self._descriptor)
        if not len(self):
            raise DataError(f"annotation file {self.path} has no entry. Check that it was written to its end.")

    def content_hash(self) -> str:
        """sha256 of the file in hex."""
        if not self._scan.digest:
            with open(self._descriptor, "rb", closefd=False) as file:
                self._scan.digest = _digest(file)
        return self._scan.digest

    def _scan_once(self, file: BinaryIO) -> _Scan:
        """Scan the file, or wait for another process that does so and read what it has found from the cache."""
        with ExitStack() as stack:
            if self._cache and _state(file)[0] >= _MIN_CACHED_BYTES:
                lock = self._cache_file().with_suffix(".lock")
                with suppress(OSError):  # a cache that cannot be written is reported when lengths are measured
                    stack.enter_context(file_lock(lock, purpose=f"scanning {self.path}"))
            return self._read_cache(file) or self._scan_file(file)

    def _scan_file(self, file: BinaryIO) -> _Scan:
        file.seek(0)
        offsets = array("q")
        for start, end in find_lines(file) if self.path.suffix in LINE_SUFFIXES else find_items(file):
            offsets.extend((start, end))
        scan = _Scan(np.frombuffer(offsets, np.int64).reshape(-1, 2), _state(file))
        if self._cache and scan.state[0] >= _MIN_CACHED_BYTES:
            scan.digest = _digest(file)
            arrays = {
                "offsets": scan.offsets,
                "state": scan.state,
                "digest": np.frombuffer(scan.digest.encode(), np.uint8),
            }
            if (_state(file) == scan.state).all():
                with suppress(OSError):  # see _scan_once
                    write_arrays(self._cache_file(), **arrays)
        return scan

    def _read_cache(self, file: BinaryIO) -> _Scan | None:
        """The offsets from the cache, if the file has the size and the modification time that it had then."""
        if self._cache is None or _state(file)[0] < _MIN_CACHED_BYTES:
            return None
        try:
            arrays = map_arrays(self._cache_file())
            if (arrays["state"] == _state(file)).all():
                return _Scan(arrays["offsets"].reshape(-1, 2), arrays["state"], arrays["digest"].tobytes().decode())
        except (OSError, ValueError, KeyError):  # absent or damaged
            pass
        return None

    def _cache_file(self) -> Path:
        assert self._cache is not None
        where = hashlib.sha256(str(self.path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self._cache / f"{self.path.stem}-{where}.entries.arrays"

    def __len__(self) -> int:
        return len(self._scan.offsets)

    def entry(self, index: int) -> Any:
        """Entry `index` as parsed JSON.

        Raises:
            SampleError: the entry is not JSON: a .jsonl file has a bad line, or the file changed after it was opened.
        """
        start, end = self._scan.offsets[index].tolist()
        try:
            return json.loads(os.pread(self._descriptor, end - start, start).decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise SampleError(
                f"#{index}", str(self.path), "not JSON", str(error), "Fix or remove the entry."
            ) from error


def _state(file: BinaryIO) -> np.ndarray:
    status = os.fstat(file.fileno())
    return np.array([status.st_size, status.st_mtime_ns], np.int64)


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _remedy(path: Path) -> str:
    """What to do about a file that cannot be read: the most similar name in its folder."""
    folder = path.parent
    if path.exists() or not folder.is_dir():
        return "Check the path."
    guess = nearest(path.name, sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES))
    return f"Did you mean {folder / guess}?" if guess else "Check the path."
