"""Shards: samples in mosaicml-streaming's MDS format, with its built-in encodings only, so that it reads them unaided.

| column        | encoding | holds |
|---------------|----------|-------|
| annotation    | json     | the annotation, id included |
| images        | bytes    | the original image files, end to end; never encoded anew |
| image_lengths | json     | bytes of each image file |
| image_sizes   | json     | [width, height] of each image, upright |

Lists are JSON because the format's arrays may not be empty, and a sample of text alone has no image.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.streaming_shim import import_streaming

COLUMNS = {
    "annotation": "json",
    "images": "bytes",
    "image_lengths": "json",
    "image_sizes": "json",
}
INDEX = "index.json"


@dataclass
class ShardSample:
    """One sample as it lies in a shard."""

    annotation: dict[str, Any]
    images: list[bytes]
    image_sizes: list[tuple[int, int]]
    """Upright (width, height) of each image."""


class ShardWriter:
    """Writes one folder of shards; used as a context manager.

    Shards go into a sibling folder first, which takes the final name when all is written: a folder by that name is
    whole.
    """

    def __init__(self, folder: str | Path, size_limit: int = 1 << 26) -> None:
        """
        Args:
            folder: must not exist, or be empty.
            size_limit: bytes of a shard.

        Raises:
            DataError: there is something in `folder` already.
        """
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise DataError(f"{self.folder} exists and is not empty. Choose another folder, or remove it first.")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.written = 0
        self._writer = import_streaming().MDSWriter(
            out=str(self.partial), columns=COLUMNS, hashes=["sha1"], size_limit=size_limit, progress_bar=False
        )

    def write(self, sample: ShardSample) -> None:
        self._writer.write(
            {
                "annotation": sample.annotation,
                "images": b"".join(sample.images),
                "image_lengths": [len(image) for image in sample.images],
                "image_sizes": sample.image_sizes,
            }
        )
        self.written += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.finish()
        if kind is not None or not self.written:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if self.folder.exists():
            self.folder.rmdir()  # empty, as checked
        self.partial.rename(self.folder)


class ShardFolder:
    """Reads a folder of shards at random."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            DataError: there is no such folder, no index in it, a shard is missing, or its columns are others.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX
        if not self.folder.is_dir():
            raise DataError(f"shard folder {self.folder} does not exist. Check data_path.")
        if not index.is_file():
            raise DataError(
                f"shard folder {self.folder} has no {INDEX}: it is no shard folder, or was not written to the end. "
                "Write it with tools/prepare_shards.py."
            )
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
            columns = {name for shard in shards for name in shard["column_names"]}
            files = [shard["raw_data"]["basename"] for shard in shards]
            self.starts = np.cumsum([0, *(shard["samples"] for shard in shards)], dtype=np.int64)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index} is not an MDS index: {type(error).__name__} {error}") from error
        if columns != set(COLUMNS):
            raise DataError(
                f"shard folder {self.folder} has the columns {sorted(columns)}, expected {sorted(COLUMNS)}. "
                "Write it with tools/prepare_shards.py."
            )
        missing = [name for name in files if not (self.folder / name).is_file()]
        if missing:
            raise DataError(
                f"shard folder {self.folder} lacks {len(missing)} of {len(files)} shards, first {missing[0]}"
            )
        self.content_hash = hashlib.sha256(index.read_bytes()).hexdigest()
        """Changes with any shard: the index holds their hashes."""
        self._data = import_streaming().LocalDataset(local=str(self.folder))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> ShardSample:
        columns = self._data[index]
        bounds = [0, *accumulate(columns["image_lengths"])]
        images = [columns["images"][start:stop] for start, stop in pairwise(bounds)]
        return ShardSample(columns["annotation"], images, [(w, h) for w, h in columns["image_sizes"]])
