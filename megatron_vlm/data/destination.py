"""Where a set of shards is written to: a local folder or an S3 store, behind one interface.

A set is written part by part and is whole when its index.json is there: in a local folder all lies in a sibling folder
`<name>.partial` until then, in a store the index is written last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vlm.data import s3
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards import INDEX


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
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} exists and is not empty. Choose another folder, or remove it first.")
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")

    def read(self, name: str) -> bytes | None:
        path = self.partial / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:  # type: ignore[override]
        path = self.partial / name
        if path.exists():  # of a run that ended between a part and the note that it is done
            shutil.rmtree(path)
        yield path

    def names(self, folder: str) -> list[str]:
        path = self.partial / folder
        return sorted(item.name for item in path.iterdir() if item.name[0] != ".") if path.is_dir() else []

    def publish(self, index: bytes) -> None:
        self.write(INDEX, index)
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
        with tempfile.TemporaryDirectory(prefix="shards-") as folder:
            path = Path(folder, "part")
            yield path
            if path.is_dir():
                for file in sorted(path.iterdir()):
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
