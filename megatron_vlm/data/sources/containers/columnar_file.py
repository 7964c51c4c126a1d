"""Parquet and Arrow files, read by row group: a sample needs one group of them in memory, never the file.

pyarrow is imported when the first such file is opened: nothing else needs it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError

PARQUET, ARROW = ".parquet", ".arrow"
MAX_GROUP_BYTES = 1 << 30
"""A larger row group is rejected: each worker of each rank would hold it."""
_CACHE_BYTES = 1 << 28
"""Of the row groups that a process keeps."""
_BLOCK = 1 << 22


class ColumnarFile:
    """The rows of one `.parquet` or `.arrow` file (a stream, as Hugging Face datasets saves it)."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DataError: pyarrow is not installed, or the file cannot be read, is damaged or was truncated.
        """
        self.path = path
        opened = self._open()
        schema = opened.schema_arrow if path.suffix == PARQUET else opened[0].schema
        self.columns: list[str] = schema.names
        if path.suffix == PARQUET:
            groups = [opened.metadata.row_group(index) for index in range(opened.metadata.num_row_groups)]
            sizes, self._bytes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        else:
            sizes, self._bytes = [batch.num_rows for batch in opened], [0] * len(opened)  # mapped, not read
        self.group_starts = np.cumsum([0, *sizes], dtype=np.int64)
        """[groups + 1]: group k holds the rows [group_starts[k], group_starts[k + 1])."""
        self._process, self._opened = os.getpid(), opened
        self._groups: OrderedDict[tuple[int, tuple[str, ...]], Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    @property
    def largest_group(self) -> int:
        """Bytes of the largest row group in memory; 0 for a file that is memory-mapped."""
        return max(self._bytes, default=0)

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """The values of some columns of a row, as Python objects.

        Raises:
            DataError: the row group is damaged.
        """
        group = int(np.searchsorted(self.group_starts, index, side="right")) - 1
        table = self._group(group, tuple(columns))
        inside = index - int(self.group_starts[group])
        return {name: table.column(name)[inside].as_py() for name in columns}

    def digest(self, columns: Sequence[str]) -> str:
        """sha256 in hex of the layout of the file and the bytes of some columns, as they are stored."""
        digest = hashlib.sha256(repr((self.columns, self.group_starts.tolist())).encode())
        opened = self._handle()
        if self.path.suffix == ARROW:
            for batch in opened:
                for name in columns:
                    for buffer in batch.column(name).buffers():
                        digest.update(buffer or b"")
            return digest.hexdigest()
        metadata, wanted = opened.metadata, set(columns)
        with self.path.open("rb") as file:
            for group in range(metadata.num_row_groups):
                for number in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(number)
                    if chunk.path_in_schema.partition(".")[0] in wanted:
                        start = chunk.dictionary_page_offset or chunk.data_page_offset
                        file.seek(min(start, chunk.data_page_offset))
                        left = chunk.total_compressed_size
                        while block := file.read(min(left, _BLOCK)):
                            digest.update(block)
                            left -= len(block)
        return digest.hexdigest()

    def _group(self, group: int, columns: tuple[str, ...]) -> Any:
        handle = self._handle()
        if self.path.suffix == ARROW:
            return handle[group]
        key = group, columns
        if key not in self._groups:
            try:
                self._groups[key] = handle.read_row_group(group, columns=list(columns), use_threads=False)
            except Exception as error:  # pyarrow raises its own errors and OSError
                raise DataError(
                    f"{self.path} is damaged in row group {group}: {_line(error)}. Copy it again."
                ) from error
            while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _handle(self) -> Any:
        """The open file. A forked process opens a Parquet file again: the position in it would be shared."""
        if self.path.suffix == PARQUET and self._process != os.getpid():
            self._process, self._opened = os.getpid(), self._open()
        return self._opened

    def _open(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(f"reading {self.path} needs pyarrow: pip install 'megatron-vlm[parquet]'") from error
        try:
            if self.path.suffix == PARQUET:
                return parquet.ParquetFile(self.path)
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.path))).read_all().to_batches()
            if not batches:
                raise DataError(f"{self.path} has no row. Leave it out.")
            return batches
        except FileNotFoundError:
            raise DataError(f"{self.path} does not exist. Check the path.") from None
        except (pyarrow.ArrowException, OSError) as error:
            what = f"{self.path} is not a whole {self.path.suffix[1:]} file: {_line(error)}"
            raise DataError(f"{what}. Copy or download it again.") from error


def _line(error: Exception) -> str:
    return str(error).replace("\n", " ").rstrip(".")[:200]
