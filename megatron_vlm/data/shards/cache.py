"""Shards from an S3 store on a local disk: bounded, shared by all processes of a machine, nothing left to mend.

All state is files, so a process that is killed takes nothing with it: a shard appears by a rename when it is whole, a
download reserves its place by its partial file's size, and locks (flock) end with the process that held them. What was
not used longest goes first. A file that is removed while somebody reads it stays readable until it is closed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.s3 import download

logger = logging.getLogger(__name__)

_PARTIAL, _LOCK = ".partial", ".lock"
_POLL_SECONDS = 0.05


class ShardCache:
    """A folder that holds shards of any number of sets."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        """
        Args:
            folder: on a local disk; made if need be.
            limit: bytes that it may hold; default: no limit. All processes that share it should agree.
        """
        self.folder = Path(folder)
        self.limit = limit

    def open(self, url: str, place: str, size: int, sha1: str | None = None) -> BinaryIO:
        """A shard, open for reading; fetched first if it is not here.

        Args:
            url: where it is fetched from.
            place: its path below the folder; another content must have another place.
            size: its bytes.
            sha1: hex, if known.

        Raises:
            DataError: it is missing, truncated, damaged or cannot be fetched; or is larger than the cache may be.
        """
        path = self.folder / place
        while True:
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  (the caller closes it)
            except FileNotFoundError:
                self._fetch(url, path, size, sha1)
                continue  # another process may have removed it since
            if os.fstat(file.fileno()).st_size != size:  # the machine went down before all of it was on the disk
                file.close()
                self.remove(place)
                continue
            with suppress(OSError):
                os.utime(path)
            return file

    def remove(self, place: str) -> None:
        """Let go of a shard that is not what it should be: it is fetched again when it is next opened."""
        (self.folder / place).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, size: int, sha1: str | None) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(path.name + _LOCK)):
                if path.exists():
                    return  # another process was quicker
                partial = path.with_name(path.name + _PARTIAL)
                self._reserve(partial, size)
                try:
                    download(url, partial, size, sha1)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"shard {url} cannot be kept in {self.folder}: {error}. Check cache_dir.") from error

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room, and take it with a file of the size to come."""
        if self.limit is not None and size > self.limit:
            raise DataError(
                f"a shard of {size} bytes is larger than the cache may be ({self.limit} bytes): raise cache_limit"
            )
        while True:
            with _locked(self.folder / _LOCK):
                partial.unlink(missing_ok=True)
                if self.limit is None or self._make_room(size):
                    with open(partial, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_POLL_SECONDS)  # other processes are fetching: their shards can be removed when they are here

    def _make_room(self, size: int) -> bool:
        """Remove what was not used longest until `size` bytes fit; False: they do not even then."""
        assert self.limit is not None
        kept: list[tuple[float, int, Path]] = []
        used = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                status = path.stat()
                used += status.st_size
                kept.append((status.st_mtime, status.st_size, path))
        for _, bytes_, path in sorted(kept):
            if used + size <= self.limit:
                break
            if path.name.endswith(_PARTIAL) and not _abandoned(path):
                continue
            path.unlink(missing_ok=True)
            used -= bytes_
        return used + size <= self.limit

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder):
            yield from (Path(folder, name) for name in names if not name.endswith(_LOCK))

    @property
    def used(self) -> int:
        """Bytes it holds now, those reserved by downloads included."""
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _abandoned(partial: Path) -> bool:
    """Whether the process that was fetching this is gone."""
    with open(str(partial).removesuffix(_PARTIAL) + _LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
