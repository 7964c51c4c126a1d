"""Annotation files of which only byte offsets are in memory."""

from __future__ import annotations

import json
import os
import weakref
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.errors import nearest
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.sources.json_index import find_items, find_lines

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES)
"""Of annotation files."""


class AnnotationFile:
    """The entries of one `.json` (a list), `.jsonl` or `.ndjson` file. Only their byte offsets are held in memory.

    An entry is read from disk on access. Millions of parsed entries would take gigabytes in every rank, whereas the
    page cache is shared by all ranks and workers of a node.
    """

    def __init__(self, path: str | Path) -> None:
        """Index the entries.

        Raises:
            DataError: the file is missing, is not a list of entries, or is empty.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                offsets = array("q")
                for start, end in find_lines(file) if self.path.suffix in LINE_SUFFIXES else find_items(file):
                    offsets.extend((start, end))
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise DataError(
                f"annotation file {self.path} cannot be read: {error.strerror}. {_remedy(self.path)}"
            ) from error
        except ValueError as error:
            raise DataError(f"annotation file {self.path} {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._offsets = np.frombuffer(offsets, np.int64).reshape(-1, 2)
        if not len(self._offsets):
            raise DataError(f"annotation file {self.path} has no entry")

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


def _remedy(path: Path) -> str:
    """What to do about a file that cannot be read: the most similar name in its folder."""
    folder = path.parent
    if path.exists() or not folder.is_dir():
        return "Check the path."
    guess = nearest(path.name, sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES))
    return f"Did you mean {folder / guess}?" if guess else "Check the path."
