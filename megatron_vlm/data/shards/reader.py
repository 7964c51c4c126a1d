"""Random access to shards in a local folder or in S3: ours, and those written by the published Instella-VL code."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import mds_format, published_encodings, s3
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.mds_format import INDEX, ShardSample

_CORRUPTION_ERRORS = (ValueError, KeyError, TypeError, IndexError)
"""Raised when a sample of a damaged shard is read."""


@dataclass(frozen=True)
class _File:
    """A shard or a metadata file."""

    name: str
    samples: int
    size: int
    sha1: str | None
    encodings: dict[str, str]
    """By column; empty for a metadata file."""


class ShardFolder:
    """A shard set with random access to its samples."""

    def __init__(self, folder: str | Path, cache: ShardCache | None = None) -> None:
        """
        Args:
            folder: local folder or s3:// prefix.
            cache: for shards from S3.

        Raises:
            DataError: the folder or its index does not exist, a shard is missing or truncated, its columns are unknown,
                or it is in S3 and there is no cache.
        """
        self.folder = str(folder)
        self._cache = cache
        self._remote = s3.is_remote(self.folder)
        if self._remote and cache is None:
            raise DataError(f"{folder} is read through a cache on a local disk: set cache_dir to a local folder")
        content = self._read_index()
        self.content_hash = hashlib.sha256(content).hexdigest()
        """Changes when any of our shards changes, because the index holds their hashes."""
        try:
            index = json.loads(content)
            self._shards = [_shard(entry, self.folder) for entry in index["shards"]]
            self._metadata_files = [
                _File(entry["basename"], entry["samples"], entry["bytes"], entry["sha1"], {})
                for entry in index.get("annotations", [])
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{s3.join(self.folder, INDEX)} is not an MDS index: {type(error).__name__} {error}. "
                "Copy the folder again, or write it with megatron-vlm prepare-shards."
            ) from error
        if not self._shards:
            raise DataError(f"{s3.join(self.folder, INDEX)} lists no shard. Check that the set was written to its end.")
        self.starts = np.cumsum([0, *(shard.samples for shard in self._shards)], dtype=np.int64)
        """[shards + 1]: shard k holds samples [starts[k], starts[k + 1])."""
        self._metadata_starts = np.cumsum([0, *(file.samples for file in self._metadata_files)], dtype=np.int64)
        self._loaded_metadata: tuple[int, list[bytes]] = (-1, [])
        self._check_columns()
        if not self._remote:
            self._check_files()

    def _read_index(self) -> bytes:
        advice = "it is not a shard folder, or it is incomplete. Write it with megatron-vlm prepare-shards."
        if self._remote:
            try:
                return s3.read_bytes(s3.join(self.folder, INDEX))
            except s3.ObjectMissing as error:
                raise DataError(f"{self.folder} has no {INDEX}: {advice}") from error
        if not Path(self.folder).is_dir():
            raise DataError(f"shard folder {self.folder} does not exist. Check data_path.")
        path = Path(self.folder, INDEX)
        if not path.is_file():
            raise DataError(f"shard folder {self.folder} has no {INDEX}: {advice}")
        return path.read_bytes()

    def _check_columns(self) -> None:
        for shard in self._shards:
            if set(shard.encodings) not in (set(mds_format.COLUMNS), published_encodings.COLUMNS):
                raise DataError(
                    f"shard folder {self.folder} has the columns {sorted(shard.encodings)}, expected "
                    f"{sorted(mds_format.COLUMNS)}, or {sorted(published_encodings.COLUMNS)} as published. "
                    "Write it with megatron-vlm prepare-shards."
                )

    def _check_files(self) -> None:
        files = [*self._shards, *self._metadata_files]
        missing = [file.name for file in files if not Path(self.folder, file.name).is_file()]
        if missing:
            raise DataError(
                f"shard folder {self.folder} lacks {len(missing)} of {len(files)} files, the first is {missing[0]}"
            )
        for file in files:
            size = os.path.getsize(Path(self.folder, file.name))
            if size != file.size:
                raise DataError(
                    f"shard {s3.join(self.folder, file.name)} has {size} bytes, but the index says {file.size}: "
                    "it was truncated or replaced. Copy or write it again."
                )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def has_metadata(self) -> bool:
        """Whether annotations and image sizes can be read without the images."""
        return int(self._metadata_starts[-1]) == len(self)

    def __getitem__(self, index: int) -> ShardSample:
        """
        Raises:
            DataError: the shard cannot be downloaded or is damaged. The message names it.
        """
        shard_index = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard, offset = self._shards[shard_index], index - int(self.starts[shard_index])
        try:
            try:
                return self._read(shard, offset)
            except _CORRUPTION_ERRORS:
                if self._cache is None or not self._remote:
                    raise
                self._cache.remove(self._cached_name(shard))  # only the cached copy may be damaged
                return self._read(shard, offset)
        except FileNotFoundError as error:
            raise DataError(f"shard {s3.join(self.folder, shard.name)} does not exist any more") from error
        except _CORRUPTION_ERRORS as error:
            raise DataError(
                f"shard {s3.join(self.folder, shard.name)} is damaged at its sample {offset}: {error}. "
                "Copy or write it again."
            ) from error

    def _read(self, shard: _File, offset: int) -> ShardSample:
        with self._open(shard) as file:
            columns = dict(_read_columns(file, offset, shard.encodings))
        return _our_sample(columns) if "annotation" in columns else _published_sample(columns, shard.encodings)

    def metadata(self, index: int) -> ShardSample:
        """A sample without its images, read from a metadata file. Without such files, the whole sample is read.

        Fast only for ascending indices, because one metadata file is kept in memory.
        """
        if not self.has_metadata:
            return self[index]
        file_index = int(np.searchsorted(self._metadata_starts, index, side="right")) - 1
        if self._loaded_metadata[0] != file_index:
            with self._open(self._metadata_files[file_index]) as file:
                self._loaded_metadata = file_index, gzip.decompress(file.read()).splitlines()
        line = json.loads(self._loaded_metadata[1][index - int(self._metadata_starts[file_index])])
        return ShardSample(line["annotation"], [], [(w, h) for w, h in line["image_sizes"]])

    def _open(self, file: _File) -> BinaryIO:
        if self._remote:
            assert self._cache is not None
            return self._cache.open(s3.join(self.folder, file.name), self._cached_name(file), file.size, file.sha1)
        return open(Path(self.folder, file.name), "rb", buffering=0)

    def _cached_name(self, file: _File) -> str:
        return f"{self.folder.rstrip('/').rpartition('/')[2]}-{self.content_hash[:16]}/{file.name}"


def _shard(entry: dict[str, Any], folder: str) -> _File:
    if entry.get("zip_data"):
        raise DataError(f"{folder} holds compressed shards ({entry['compression']}), which are not supported")
    raw = entry["raw_data"]
    encodings = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if any(entry["column_sizes"]):
        raise TypeError("columns of fixed size are not supported")
    return _File(raw["basename"], entry["samples"], raw["bytes"], (raw.get("hashes") or {}).get("sha1"), encodings)


def _read_columns(file: BinaryIO, index: int, encodings: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """The columns of one sample.

    An MDS file holds the number of samples, their offsets (uint32), a header, and the samples. Each sample holds the
    sizes of its columns (uint32) and their bytes.
    """
    begin, end = np.frombuffer(os.pread(file.fileno(), 8, 4 * (1 + index)), "<u4").tolist()
    data = os.pread(file.fileno(), end - begin, begin)
    sizes = np.frombuffer(data[: 4 * len(encodings)], "<u4").tolist()
    offsets = list(accumulate([4 * len(encodings), *sizes]))
    if len(data) != end - begin or offsets[-1] != len(data):
        raise ValueError(f"expected {offsets[-1]} bytes, got {len(data)}")
    for name, (start, stop) in zip(encodings, pairwise(offsets), strict=True):
        yield name, data[start:stop]


def _our_sample(columns: dict[str, bytes]) -> ShardSample:
    offsets = [0, *accumulate(json.loads(columns["image_lengths"]))]
    images = [columns["images"][start:stop] for start, stop in pairwise(offsets)]
    sizes = [(w, h) for w, h in json.loads(columns["image_sizes"])]
    return ShardSample(json.loads(columns["annotation"]), images, sizes)


def _published_sample(columns: dict[str, bytes], encodings: dict[str, str]) -> ShardSample:
    annotation = json.loads(columns["text"])
    if not isinstance(annotation, dict) or annotation.get("image") in (None, "", []):
        return ShardSample(annotation, [], [])  # the image column holds a placeholder
    if published_encodings.is_jpeg_list(encodings["image"]):
        images = published_encodings.split_jpeg_list(columns["image"])
    elif published_encodings.is_image(encodings["image"]):
        images = [columns["image"]]
    else:
        raise ValueError(f"the image column has the unknown encoding {encodings['image']}")
    return ShardSample(annotation, images, None)
