"""The shards we write: MDS format with built-in encodings only, so that stock mosaicml-streaming reads them.

| column        | encoding | content |
|---------------|----------|---------|
| annotation    | json     | the annotation with its id |
| images        | bytes    | the original image files, concatenated; never re-encoded |
| image_lengths | json     | size of each image file in bytes |
| image_sizes   | json     | [width, height] of each image after EXIF rotation |

Lists are JSON because MDS arrays must not be empty, and a text-only sample has no image.

`annotations.jsonl.gz` next to the shards holds what planning needs, one line per sample: annotations and image sizes
without the images. The key `annotations` of index.json lists these files; mosaicml-streaming ignores it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.mds_writer import MDSWriter
from megatron_vlm.runtime.atomic_files import is_absent_or_empty

COLUMNS = {
    "annotation": "json",
    "images": "bytes",
    "image_lengths": "json",
    "image_sizes": "json",
}
INDEX = "index.json"
SAMPLE_METADATA = "annotations.jsonl.gz"


@dataclass
class ShardSample:
    """One sample as stored in a shard."""

    annotation: dict[str, Any]
    images: list[bytes]
    image_sizes: list[tuple[int, int]] | None
    """Upright (width, height) of each image; None: the shard does not record them."""


class ShardWriter:
    """Writes one shard folder. Use it as a context manager.

    Shards are written to a sibling folder `<name>.partial`, which is renamed at the end, so that a folder without that
    suffix is complete.
    """

    def __init__(self, folder: str | Path, size_limit: int = 1 << 26) -> None:
        """
        Args:
            folder: must not exist or must be empty.
            size_limit: of a shard, in bytes.

        Raises:
            DataError: `folder` exists and is not empty.
        """
        self.folder = Path(folder)
        if not is_absent_or_empty(self.folder):
            raise DataError(f"{self.folder} exists and is not empty. Choose another folder or remove it first.")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.written = 0
        self._writer = MDSWriter(self.partial, COLUMNS, size_limit)
        # mtime=0: the same samples give the same bytes.
        self._metadata_file = gzip.GzipFile(self.partial / SAMPLE_METADATA, "wb", compresslevel=4, mtime=0)

    def write(self, sample: ShardSample) -> None:
        self._writer.write(
            {
                "annotation": sample.annotation,
                "images": b"".join(sample.images),
                "image_lengths": [len(image) for image in sample.images],
                "image_sizes": sample.image_sizes,
            }
        )
        metadata = {"annotation": sample.annotation, "image_sizes": sample.image_sizes}
        self._metadata_file.write(json.dumps(metadata).encode() + b"\n")
        self.written += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metadata_file.close()
        self._writer.finish()
        if kind is not None or not self.written:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        sample_metadata = (self.partial / SAMPLE_METADATA).read_bytes()
        index = json.loads((self.partial / INDEX).read_text(encoding="utf-8"))
        index["annotations"] = [
            {
                "basename": SAMPLE_METADATA,
                "samples": self.written,
                "bytes": len(sample_metadata),
                "sha1": hashlib.sha1(sample_metadata, usedforsecurity=False).hexdigest(),
            }
        ]
        (self.partial / INDEX).write_text(json.dumps(index), encoding="utf-8")
        if self.folder.exists():
            self.folder.rmdir()  # empty, as checked
        self.partial.rename(self.folder)


def merge_indexes(parts: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The index.json of a shard set whose parts are subfolders.

    Args:
        parts: (subfolder, its index.json), in the order of the samples.
    """
    merged: dict[str, Any] = {"version": 2, "shards": [], "annotations": []}
    for folder, index in parts:
        for shard in index["shards"]:
            raw = {**shard["raw_data"], "basename": f"{folder}/{shard['raw_data']['basename']}"}
            merged["shards"].append({**shard, "raw_data": raw})
        for sample_metadata in index["annotations"]:
            merged["annotations"].append({**sample_metadata, "basename": f"{folder}/{sample_metadata['basename']}"})
    return merged
