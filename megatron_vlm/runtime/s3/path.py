"""A path in an object store, with as much of pathlib's interface as readers of a checkpoint use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.runtime.s3 import objects
from megatron_vlm.runtime.s3.client import is_remote, join


@dataclass(frozen=True, order=True)
class S3Path:
    """s3://bucket/prefix. What fails raises S3Error; what is missing, ObjectMissing, which is a FileNotFoundError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(join(self.url, name))

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> S3Path:
        return S3Path(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> S3Path:
        return self.parent / name

    def is_file(self) -> bool:
        return objects.exists(self.url)

    def is_dir(self) -> bool:
        """Whether there is an object below this prefix."""
        return bool(objects.list_folder(self.url))

    def iterdir(self) -> Iterator[S3Path]:
        """Objects and prefixes directly below this one."""
        return (self / name for name in objects.list_folder(self.url))

    def read_bytes(self) -> bytes:
        return objects.read_bytes(self.url)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Appears whole or not at all."""
        objects.write(data, self.url)


StoragePath = Path | S3Path
"""Where checkpoints lie."""


def file_size(path: StoragePath) -> int | None:
    """Bytes of a file or object; None if there is none."""
    if isinstance(path, S3Path):
        return objects.size(path.url)
    return path.stat().st_size if path.is_file() else None


def storage_path(path: str | StoragePath) -> StoragePath:
    """The path that a setting names: in an object store if it is an s3:// URL."""
    if isinstance(path, S3Path):
        return path
    return S3Path(str(path).rstrip("/")) if is_remote(path) else Path(path)
