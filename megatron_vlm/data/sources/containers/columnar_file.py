"""Parquet and Arrow files, read by row group: a sample needs one group of them in memory, never the file.

pyarrow is imported when the first such file is opened: nothing else needs it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError

PARQUET, ARROW = ".parquet", ".arrow"
MAX_GROUP_BYTES = 1 << 30
"""A larger row group is rejected: each worker of each rank would hold it."""
_CACHE_BYTES = 1 << 28
"""Of the row groups that a process keeps, of all its files together."""
_BLOCK = 1 << 22


class _GroupCache:
    """The row groups that were read last, at least one."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Path, int, tuple[str, ...]], Any] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[Path, int, tuple[str, ...]], read: Callable[[], Any]) -> Any:
        """The table under `key`, which `read` returns if it is not kept."""
        if key not in self._tables:
            self._tables[key] = read()
            self._bytes += self._tables[key].nbytes
            while self._bytes > _CACHE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end(key)
        return self._tables[key]


_groups = _GroupCache()
"""Of this process: a folder of hundreds of files takes no more memory than one file."""


class ColumnarFile:
    """The rows of one `.parquet` or `.arrow` file (a stream, as Hugging Face datasets saves it)."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DataError: pyarrow is not installed, or the file cannot be read, is damaged or was truncated.
        """
        self.path = path
        self._metadata: Any = None
        self._batches: list[Any] | None = None
        if path.suffix == PARQUET:
            with self._open_parquet() as file:
                self._metadata, schema = file.metadata, file.schema_arrow
            groups = [self._metadata.row_group(index) for index in range(self._metadata.num_row_groups)]
            sizes, self._bytes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        else:
            self._batches = self._map_arrow()
            schema = self._batches[0].schema
            sizes, self._bytes = [batch.num_rows for batch in self._batches], []  # mapped, not read
        self.columns: list[str] = schema.names
        self.group_starts = np.cumsum([0, *sizes], dtype=np.int64)
        """[groups + 1]: group k holds the rows [group_starts[k], group_starts[k + 1])."""

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
        if self._batches is not None:
            for batch in self._batches:
                for name in columns:
                    for buffer in batch.column(name).buffers():
                        digest.update(buffer or b"")
            return digest.hexdigest()
        metadata, wanted = self._metadata, set(columns)
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
        if self._batches is not None:
            return self._batches[group]
        return _groups.get((self.path, group, columns), lambda: self._read_group(group, columns))

    def _read_group(self, group: int, columns: tuple[str, ...]) -> Any:
        try:
            with self._open_parquet() as file:  # not kept open: a process may have more files than it may open
                return file.read_row_group(group, columns=list(columns), use_threads=False)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises its own errors and OSError
            what = f"{self.path} is damaged in row group {group}: {_line(error)}"
            raise DataError(f"{what}. Copy it again.") from error

    def _open_parquet(self) -> Any:
        with self._read_errors():
            from pyarrow import parquet

            return parquet.ParquetFile(self.path, metadata=self._metadata)

    def _map_arrow(self) -> list[Any]:
        with self._read_errors():
            import pyarrow

            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.path))).read_all().to_batches()
        if not batches:
            raise DataError(f"{self.path} has no row. Leave it out.")
        return list(batches)

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise DataError(f"reading {self.path} needs pyarrow: pip install 'megatron-vlm[parquet]'") from error
        except FileNotFoundError:
            raise DataError(f"{self.path} does not exist. Check the path.") from None
        except Exception as error:  # pyarrow raises its own errors, OSError and ValueError
            what = f"{self.path} is not a whole {self.path.suffix[1:]} file: {_line(error)}"
            raise DataError(f"{what}. Copy or download it again.") from error


def _line(error: Exception) -> str:
    return str(error).replace("\n", " ").rstrip(".")[:200]
