"""Writes shard files and their index.json in mosaicml-streaming's MDS format, byte for byte as its MDSWriter does.

Writing needs no mosaicml-streaming: its pins exclude current numpy and transformers. The tests compare the files with
those of MDSWriter.

A shard file, all numbers uint32, little-endian:

    number of samples n | n + 1 offsets of samples in the file | header (JSON) | samples

A sample: the size of each column, then the columns' bytes, in alphabetical order of their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError

_SIZE = np.dtype("<u4")
_LARGEST_FILE = 2**32 - 1
"""Offsets are 32 bits wide."""


class MDSWriter:
    """Shard files of one folder; call `finish` at the end."""

    def __init__(self, folder: Path, columns: Mapping[str, str], size_limit: int) -> None:
        """
        Args:
            folder: is created.
            columns: name -> encoding: `json` or `bytes`.
            size_limit: bytes of a shard file, below 4 GiB. A larger sample gets a file of its own.

        Raises:
            DataError: `size_limit` is too large for the format.
        """
        if size_limit > _LARGEST_FILE:
            raise DataError(
                f"a shard file holds at most 4 GiB; {size_limit:,} bytes were asked for. Choose a smaller size limit."
            )
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.columns = dict(sorted(columns.items()))
        self.size_limit = size_limit
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": ["sha1"],
            "size_limit": size_limit,
            "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()),
            "column_sizes": [None] * len(self.columns),
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._size = self._empty_size()

    def _empty_size(self) -> int:
        return 2 * _SIZE.itemsize + len(self._header)

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample: a value for each column.

        Raises:
            DataError: it is too large for the format.
        """
        values = [self._encode(sample[name], encoding) for name, encoding in self.columns.items()]
        data = np.array([len(value) for value in values], _SIZE).tobytes() + b"".join(values)
        size = len(data) + _SIZE.itemsize
        if self._empty_size() + size > _LARGEST_FILE:
            raise DataError(f"a sample of {len(data):,} bytes: a shard file holds at most 4 GiB")
        if self._samples and self._size + size > self.size_limit:
            self._write_shard()
        self._samples.append(data)
        self._size += size

    @staticmethod
    def _encode(value: Any, encoding: str) -> bytes:
        return value if encoding == "bytes" else json.dumps(value).encode()

    def _write_shard(self) -> None:
        count = len(self._samples)
        offsets = np.cumsum([_SIZE.itemsize * (count + 2) + len(self._header), *map(len, self._samples)])
        data = b"".join(
            [np.array(count, _SIZE).tobytes(), offsets.astype(_SIZE).tobytes(), self._header, *self._samples]
        )
        name = f"shard.{len(self._shards):05}.mds"
        (self.folder / name).write_bytes(data)
        raw = {
            "basename": name,
            "bytes": len(data),
            "hashes": {"sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()},
        }
        self._shards.append({**self._config, "samples": count, "raw_data": raw, "zip_data": None})
        self._samples, self._size = [], self._empty_size()

    def finish(self) -> None:
        """Write the last shard file, and index.json."""
        if self._samples:
            self._write_shard()
        index = json.dumps({"version": 2, "shards": self._shards}, sort_keys=True)
        (self.folder / "index.json").write_text(index, encoding="utf-8")
