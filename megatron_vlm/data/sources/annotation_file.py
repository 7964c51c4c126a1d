"""Annotation files of which only byte offsets are in memory."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.config.errors import nearest
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.sources.file_cache import Arrays, computed_once, file_state
from megatron_vlm.data.sources.gzip_copy import GZIP, open_decompressed
from megatron_vlm.data.sources.json_index import find_items, find_lines

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", ".json_new", *LINE_SUFFIXES)
"""Of annotation files, each also with .gz. Lists of the published data have .json_new files; they are .json."""
_MIN_CACHED_BYTES = 1 << 20
"""A smaller file is scanned in milliseconds."""
_BLOCK = 1 << 24


def suffix_of(path: str | Path) -> str:
    """The suffix that says how the entries are written, without .gz."""
    return Path(str(path).removesuffix(GZIP)).suffix


def is_annotation_file(path: str | Path) -> bool:
    """Whether the name is that of an annotation file."""
    return suffix_of(path) in SUFFIXES


class AnnotationFile:
    """The entries of one `.json` (a list), `.jsonl` or `.ndjson` file, also with `.gz`. Only byte offsets are held in
    memory.

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
        cache = Path(cache_dir) if cache_dir else None
        try:
            with self._open(cache) as file:
                arrays = self._read(file, cache)
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
        self._offsets, self._digest = arrays["offsets"], arrays["digest"].tobytes().decode()
        if not len(self):
            raise DataError(f"annotation file {self.path} has no entry. Check that it was written to its end.")

    def content_hash(self) -> str:
        """sha256 of the (decompressed) file in hex."""
        if not self._digest:
            with open(self._descriptor, "rb", closefd=False) as file:
                self._digest = _digest(file)
        return self._digest

    def _open(self, cache: Path | None) -> BinaryIO:
        return open_decompressed(self.path, cache) if self.path.suffix == GZIP else self.path.open("rb")

    def _read(self, file: BinaryIO, cache: Path | None) -> Arrays:
        """`offsets`, [n, 2] int64: where each entry starts and ends; `digest`: of the file, empty for a small one."""
        large = os.fstat(file.fileno()).st_size >= _MIN_CACHED_BYTES

        def scan() -> Arrays:
            digest = _digest(file) if large and cache else ""
            return {"offsets": self._scan(file), "digest": np.frombuffer(digest.encode(), np.uint8)}

        if not large or not cache:
            return scan()
        return computed_once(self.path, lambda: file_state(os.fstat(file.fileno())), cache, "entries", scan)

    def _scan(self, file: BinaryIO) -> np.ndarray:
        file.seek(0)
        offsets = array("q")
        for start, end in find_lines(file) if suffix_of(self.path) in LINE_SUFFIXES else find_items(file):
            offsets.extend((start, end))
        return np.frombuffer(offsets, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._offsets)

    def entry(self, index: int) -> Any:
        """Entry `index` as parsed JSON.

        Raises:
            SampleError: the entry is not JSON: a .jsonl file has a bad line, or the file changed after it was opened.
        """
        start, end = self._offsets[index].tolist()
        try:
            return json.loads(os.pread(self._descriptor, end - start, start).decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise SampleError(
                f"#{index}", str(self.path), "not JSON", str(error), "Fix or remove the entry."
            ) from error


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
    guess = nearest(path.name, sorted(file.name for file in folder.iterdir() if is_annotation_file(file)))
    return f"Did you mean {folder / guess}?" if guess else "Check the path."
