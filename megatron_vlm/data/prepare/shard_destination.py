"""Where a set of shards is written to: a local folder or an S3 store, behind one interface.

A set is written part by part and is whole when its index.json is there: in a local folder all lies in a sibling folder
`<name>.partial` until then, in a store the index is written last. A part is made in a work folder of its process, so
that two which make the same one, by mistake, do not write into each other's files.
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

_WORK, _WORK_FOR_S3 = ".work-", "megatron-vlm-shards-"
_SECONDS_TO_LOCK = 60.0


@contextmanager
def _work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder that is removed at the end of the block; those of processes that were killed are removed first.

    Its lock ends with the process, on whatever machine that shares the disk.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # another process removes it, too
            if time.time() - other.stat().st_mtime > _SECONDS_TO_LOCK:
                with _locked(other) as abandoned:
                    if abandoned:
                        shutil.rmtree(other)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process holds a folder's lock in the block: not if another one does, or the disk knows no locks."""
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
    """A set of shards in the making."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file written before; None: there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file; it is there whole or not at all."""

    @abstractmethod
    def staging(self, name: str) -> Iterator[Path]:
        """A context: the path of a folder to be made, which is in its place, as `name`, at the end of the block."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Small files written below `folder`."""

    @abstractmethod
    def publish(self, index: bytes) -> None:
        """Make the set appear."""

    @abstractmethod
    def beside(self, name: str, data: bytes) -> str:
        """Write a file beside a set that is not to appear; returns where."""


class LocalDestination(Destination):
    """A folder on a disk."""

    def __init__(self, folder: Path) -> None:
        if not is_absent_or_empty(folder):
            raise DataError(f"{folder} exists and is not empty. Choose another folder, or remove it first.")
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
            with suppress(FileNotFoundError):  # of a run that ended between a part and the note that it is done
                shutil.rmtree(self.partial / name)
            (work / name).rename(self.partial / name)

    def names(self, folder: str) -> list[str]:
        path = self.partial / folder
        return sorted(item.name for item in path.iterdir() if item.name[0] != ".") if path.is_dir() else []

    def publish(self, index: bytes) -> None:
        self.write(INDEX, index)
        for work in self.partial.glob(f"{_WORK}*"):
            shutil.rmtree(work, ignore_errors=True)
        if self.folder.exists():
            self.folder.rmdir()  # empty, as checked
        self.partial.rename(self.folder)

    def beside(self, name: str, data: bytes) -> str:
        shutil.rmtree(self.partial, ignore_errors=True)
        path = self.folder.with_name(f"{self.folder.name}.{name}")
        path.write_bytes(data)
        return str(path)


class S3Destination(Destination):
    """A prefix of an S3 store; parts are made in the folder for temporary files and sent when they are whole."""

    def __init__(self, url: str) -> None:
        if s3.exists(s3.join(url, INDEX)):
            raise DataError(f"{url} holds a set of shards already. Choose another place, or remove it first.")
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

    def names(self, folder: str) -> list[str]:
        return s3.list_names(s3.join(self.url, folder))

    def publish(self, index: bytes) -> None:
        self.write(INDEX, index)

    def beside(self, name: str, data: bytes) -> str:
        self.write(name, data)
        return s3.join(self.url, name)


def open_destination(output: str | Path) -> LocalDestination | S3Destination:
    """
    Raises:
        DataError: there is something at `output` already.
    """
    return S3Destination(str(output)) if s3.is_remote(output) else LocalDestination(Path(output))
