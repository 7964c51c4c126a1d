"""The destination of a shard set: a local folder or an S3 prefix, behind one interface.

A set is written part by part. It is complete when its index.json exists: a local set is written to the sibling folder
`<name>.partial` and renamed at the end, and in S3 the index is written last. Each process writes a part to a work
folder of its own, so that two processes that write the same part by mistake do not mix their files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import s3
from megatron_vlm.data.shards.mds_format import INDEX
from megatron_vlm.runtime.atomic_files import atomic_file, is_absent_or_empty

QUARANTINE = "quarantine.jsonl"
"""Lists the samples that are not in the set."""
_WORK, _WORK_FOR_S3 = ".work-", "megatron-vlm-shards-"
_MIN_ABANDONED_SECONDS = 60.0
"""A younger work folder may not be locked yet."""


@contextmanager
def _work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder that is removed at the end of the block. Folders that killed processes left are removed first.

    A lock marks the folder as in use. It ends with its process, also on other machines that share the disk.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # another process may remove it at the same time
            if time.time() - other.stat().st_mtime > _MIN_ABANDONED_SECONDS:
                with _locked(other) as acquired:
                    if acquired:
                        shutil.rmtree(other)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to lock a folder for the block. Yields False if another process holds it or the disk supports no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


class Destination(ABC):
    """A shard set that is being written."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Content of a small file written before; None: it does not exist."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""

    @abstractmethod
    def staging(self, name: str) -> Iterator[Path]:
        """Context manager. Yields the path of a folder to create, which becomes `name` of the set at the end."""

    @abstractmethod
    def list_names(self, folder: str) -> list[str]:
        """Names of the small files below `folder`."""

    @abstractmethod
    def publish(self, index: bytes) -> None:
        """Write the index and make the set visible."""

    @abstractmethod
    def write_beside(self, name: str, data: bytes) -> str:
        """Write a file next to a set that will not be published. Returns its path."""


class LocalDestination(Destination):
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()  # `.` has no name
        if not is_absent_or_empty(folder):
            raise DataError(f"{folder} exists and is not empty. Choose another folder or remove it first.")
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")

    def read(self, name: str) -> bytes | None:
        path = self.partial / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        with atomic_file(self.partial / name) as file:
            file.write(data)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:  # type: ignore[override]
        with _work_folder(self.partial, _WORK) as work:
            yield work / name
            if not (work / name).is_dir():
                return
            with suppress(FileNotFoundError):  # left by a run that was killed before it recorded the part as done
                shutil.rmtree(self.partial / name)
            (work / name).rename(self.partial / name)

    def list_names(self, folder: str) -> list[str]:
        path = self.partial / folder
        return sorted(item.name for item in path.iterdir() if item.name[0] != ".") if path.is_dir() else []

    def publish(self, index: bytes) -> None:
        self.write(INDEX, index)
        for work in self.partial.glob(f"{_WORK}*"):
            shutil.rmtree(work, ignore_errors=True)
        if self.folder.exists():
            self.folder.rmdir()  # empty, as checked
        self.partial.rename(self.folder)
        self._beside(QUARANTINE).unlink(missing_ok=True)  # of an earlier run without a valid sample

    def write_beside(self, name: str, data: bytes) -> str:
        shutil.rmtree(self.partial, ignore_errors=True)
        path = self._beside(name)
        path.write_bytes(data)
        return str(path)

    def _beside(self, name: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{name}")


class S3Destination(Destination):
    """A prefix in S3. Parts are written to the folder for temporary files and uploaded when they are complete."""

    def __init__(self, url: str) -> None:
        if s3.exists(s3.join(url, INDEX)):
            raise DataError(f"{url} already holds a shard set. Choose another prefix or remove it first.")
        self.url = url

    def read(self, name: str) -> bytes | None:
        try:
            return s3.read_bytes(s3.join(self.url, name))
        except s3.ObjectMissing:
            return None

    def write(self, name: str, data: bytes) -> None:
        s3.upload(data, s3.join(self.url, name))

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:  # type: ignore[override]
        with _work_folder(Path(tempfile.gettempdir()), _WORK_FOR_S3) as work:
            yield work / name
            if (work / name).is_dir():
                for file in sorted((work / name).iterdir()):
                    s3.upload(file, s3.join(self.url, f"{name}/{file.name}"))

    def list_names(self, folder: str) -> list[str]:
        return s3.list_names(s3.join(self.url, folder))

    def publish(self, index: bytes) -> None:
        self.write(INDEX, index)

    def write_beside(self, name: str, data: bytes) -> str:
        self.write(name, data)
        return s3.join(self.url, name)


def open_destination(output: str | Path) -> LocalDestination | S3Destination:
    """The destination at a folder or s3:// prefix.

    Raises:
        DataError: `output` is not empty.
    """
    return S3Destination(str(output)) if s3.is_remote(output) else LocalDestination(Path(output))
