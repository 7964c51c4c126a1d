"""Shards: samples in mosaicml-streaming's MDS format, with its built-in encodings only, so that it reads them unaided.

| column        | encoding | holds |
|---------------|----------|-------|
| annotation    | json     | the annotation, id included |
| images        | bytes    | the original image files, end to end; never encoded anew |
| image_lengths | json     | bytes of each image file |
| image_sizes   | json     | [width, height] of each image, upright |

Lists are JSON because the format's arrays may not be empty, and a sample of text alone has no image.

Beside the shards lies what planning needs of all samples, without their images: `annotations.jsonl.gz`, one line for
each, named by the key `annotations` of index.json, which mosaicml-streaming passes over.
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
from megatron_vlm.data.shards.streaming_shim import import_streaming
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
    """One sample as it lies in a shard."""

    annotation: dict[str, Any]
    images: list[bytes]
    image_sizes: list[tuple[int, int]] | None
    """Upright (width, height) of each image; None: not recorded."""


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
        if not is_absent_or_empty(self.folder):
            raise DataError(f"{self.folder} exists and is not empty. Choose another folder, or remove it first.")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.written = 0
        self._writer = import_streaming().MDSWriter(
            out=str(self.partial), columns=COLUMNS, hashes=["sha1"], size_limit=size_limit, progress_bar=False
        )
        # No time of writing inside: the same samples give the same bytes.
        self._metadata_files = gzip.GzipFile(self.partial / SAMPLE_METADATA, "wb", compresslevel=4, mtime=0)

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
        self._metadata_files.write(json.dumps(metadata).encode() + b"\n")
        self.written += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metadata_files.close()
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
    """One index.json of a set whose parts lie in folders below it.

    Args:
        parts: (folder, its index.json), in the order of the samples.
    """
    merged: dict[str, Any] = {"version": 2, "shards": [], "annotations": []}
    for folder, index in parts:
        for shard in index["shards"]:
            raw = {**shard["raw_data"], "basename": f"{folder}/{shard['raw_data']['basename']}"}
            merged["shards"].append({**shard, "raw_data": raw})
        for sample_metadata in index["annotations"]:
            merged["annotations"].append({**sample_metadata, "basename": f"{folder}/{sample_metadata['basename']}"})
    return merged
