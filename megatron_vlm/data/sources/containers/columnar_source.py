"""Parquet and Arrow files with images in them as a source of samples, as Hugging Face datasets are published.

| column | holds |
|---|---|
| `image`, `images` | `{bytes, path}` (the image feature of Hugging Face), bytes, or a path; or a list of them |
| `conversations`, `messages` | a conversation, in any form of `message_formats` |
| `id` | the id of the sample; optional |
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.sources.annotations import CONVERSATION_KEYS, IMAGE_KEYS, parse_annotation
from megatron_vlm.data.sources.containers.columnar_file import MAX_GROUP_BYTES, ColumnarFile
from megatron_vlm.data.sources.file_cache import computed_once, file_state
from megatron_vlm.data.sources.message_formats import shown
from megatron_vlm.data.sources.sample_source import EntrySource, Sample


@dataclass
class _Image:
    """A cell, or an element of a list in one."""

    name: str
    data: bytes | None
    """None: the name is a path below the image folder."""


class ColumnarSource(EntrySource):
    """The rows of one Parquet or Arrow file. Its row groups are its shards, which the order of samples follows."""

    def __init__(
        self, path: str | Path, image_folder: str | Path | None = None, cache_dir: str | Path | None = None
    ) -> None:
        """
        Args:
            path: of the file.
            image_folder: root of the image paths in rows whose images have no bytes.
            cache_dir: where the hash of the annotations is kept; None: it is computed at every start.

        Raises:
            DataError: the file is damaged, or has no column with conversations.
        """
        self.name = str(path)
        self._path, self._cache = Path(path), Path(cache_dir) if cache_dir else None
        self._image_folder = Path(image_folder) if image_folder else Path()
        self._file = ColumnarFile(self._path)
        self._image_columns = [name for name in IMAGE_KEYS if name in self._file.columns]
        self._text_columns = [name for name in self._file.columns if name not in self._image_columns]
        if not any(name in self._file.columns for name in CONVERSATION_KEYS):
            raise DataError(
                f"{path} has the columns {', '.join(self._file.columns)}, "
                f"and none of {' and '.join(CONVERSATION_KEYS)}. Convert it: convert-dataset."
            )
        if not len(self._file):
            raise DataError(f"{path} has no row. Leave it out.")
        self.shard_starts = self._file.group_starts
        self._digest = ""

    def __len__(self) -> int:
        return len(self._file)

    def check_group_sizes(self) -> None:
        """Refuse row groups that are too large to read at random.

        Raises:
            DataError: one is. `prepare_shards`, which reads in order, takes it.
        """
        if (largest := self._file.largest_group) > MAX_GROUP_BYTES:
            raise DataError(
                f"{self.name} has row groups of up to {largest / 1e9:.1f} GB, which every worker would hold in memory. "
                "Write it as shards: prepare-shards; or write it again with row groups of about 100 rows."
            )

    def entry(self, index: int) -> dict[str, Any]:
        """The row as an annotation entry: names in place of the images, without what JSON cannot hold."""
        return {name: value for name, value in self._read(index)[0].items() if _is_json(value)}

    def sample(self, index: int) -> Sample:
        entry, images = self._read(index)
        annotation = parse_annotation(entry, index, self.name)

        def open_image(i: int) -> BinaryIO:
            data = images[i].data
            return io.BytesIO(data) if data is not None else (self._image_folder / images[i].name).open("rb")

        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=annotation.image_paths,
            open_image=open_image,
            image_sizes=None if annotation.image_paths else [],
            image_files=[self._image_folder / image.name for image in images if image.data is None],
        )

    def content_hash(self) -> str:
        if not self._digest and self._cache is None:
            self._digest = self._file.digest(self._text_columns)
        elif not self._digest and self._cache is not None:
            arrays = computed_once(
                self._path, lambda: file_state(self._path.stat()), self._cache, "columns", self._hash_columns
            )
            self._digest = arrays["digest"].tobytes().decode()
        return self._digest

    def _hash_columns(self) -> dict[str, Any]:
        return {"digest": np.frombuffer(self._file.digest(self._text_columns).encode(), np.uint8)}

    def _read(self, index: int) -> tuple[dict[str, Any], list[_Image]]:
        """The row with names in place of the images, and its images.

        Raises:
            SampleError: an image column holds something else.
        """
        row = self._file.row(index, self._file.columns)
        sample_id = str(row["id"]) if row.get("id") is not None else f"#{index}"
        found: list[_Image] = []
        for column in self._image_columns:
            cell = row[column]
            if cell is None or cell == []:
                row[column] = None
                continue
            values = cell if isinstance(cell, list) else [cell]
            images = [self._image(value, number, sample_id) for number, value in enumerate(values)]
            names = [image.name for image in images]
            row[column] = names if isinstance(cell, list) else names[0]
            found = found or images
        return row, found

    def _image(self, value: Any, number: int, sample_id: str) -> _Image:
        data, path = value, None
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        elif isinstance(value, str):
            data, path = None, value
        if isinstance(data, bytes):
            return _Image(path or f"image {number}", data)
        if data is None and isinstance(path, str) and path:
            return _Image(path, None)
        remedy = "Write bytes, a path, or an object with both."
        raise SampleError(sample_id, self.name, "bad image path", f"image {number} is {shown(value)}", remedy)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
