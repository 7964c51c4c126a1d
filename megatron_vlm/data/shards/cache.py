"""A bounded local cache of shards from S3, shared by all processes of a node. A killed process leaves it consistent.

All state is in files. A complete shard is renamed into the cache, a download reserves its space with a partial file of
the final size, and file locks (flock) end with the process that holds them. The least recently used shards are evicted
first. A shard that is evicted while a process reads it stays readable until it is closed.
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
    """A folder of cached shards of any number of shard sets."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        """
        Args:
            folder: on a local disk; created if it does not exist.
            limit: maximum size in bytes; default: no limit. All processes that share the cache must use the same limit.
        """
        self.folder = Path(folder)
        self.limit = limit

    def open(self, url: str, name: str, size: int, sha1: str | None = None) -> BinaryIO:
        """Open a shard for reading. It is downloaded first if it is not cached.

        Args:
            url: of the shard.
            name: its path below the cache folder. Shards of different content need different names.
            size: in bytes.
            sha1: in hex, if known.

        Raises:
            DataError: the shard is missing, truncated, damaged, larger than the cache limit, or cannot be downloaded.
        """
        path = self.folder / name
        while True:
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  (the caller closes it)
            except FileNotFoundError:
                self._fetch(url, path, size, sha1)
                continue  # another process may have evicted it since then
            if os.fstat(file.fileno()).st_size != size:  # the machine crashed before the file was written to disk
                file.close()
                self.remove(name)
                continue
            with suppress(OSError):
                os.utime(path)
            return file

    def remove(self, name: str) -> None:
        """Remove a damaged shard. It is downloaded again when it is opened next."""
        (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, size: int, sha1: str | None) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(path.name + _LOCK)):
                if path.exists():
                    return  # another process downloaded it
                partial = path.with_name(path.name + _PARTIAL)
                self._reserve_space(partial, size)
                try:
                    download(url, partial, size, sha1)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"shard {url} cannot be cached in {self.folder}: {error}. Check cache_dir.") from error

    def _reserve_space(self, partial: Path, size: int) -> None:
        """Evict shards until `size` bytes are free, and reserve them with a partial file of that size."""
        if self.limit is not None and size > self.limit:
            raise DataError(f"a shard has {size} bytes, but the cache limit is {self.limit} bytes: raise cache_limit")
        while True:
            with _locked(self.folder / _LOCK):
                partial.unlink(missing_ok=True)
                if self.limit is None or self._evict(size):
                    with open(partial, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(_POLL_SECONDS)  # other downloads hold the space; their shards can be evicted once complete

    def _evict(self, size: int) -> bool:
        """Remove the least recently used shards until `size` bytes fit. Returns False if they still do not fit."""
        assert self.limit is not None
        cached: list[tuple[float, int, Path]] = []
        used = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                status = path.stat()
                used += status.st_size
                cached.append((status.st_mtime, status.st_size, path))
        for _, bytes_, path in sorted(cached):
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
        """Current size in bytes, including the space reserved by downloads."""
        total = 0
        # With the lock: otherwise a shard could be counted, and then what replaces it, too.
        with _locked(self.folder / _LOCK):
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
    """Whether the process that was downloading this file has ended."""
    with open(str(partial).removesuffix(_PARTIAL) + _LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
