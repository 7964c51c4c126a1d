"""Where the files of a WebDataset tar lie: found in one pass over its headers, so that samples are read in any order.

The files of a sample follow each other and have the same name up to the first dot after the last slash, its key.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.file_cache import Arrays, computed_once, file_state

TEXT_ENDINGS = ("json", "txt")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_NAME_SEPARATOR = b"\0"
_MAX_PADDING = 1 << 20
"""Zeros after the last file; tar itself fills up to 10 KiB."""


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    size: int

    @property
    def ending(self) -> str:
        """What follows the last dot of the name, in lower case."""
        return self.name.rpartition(".")[2].lower()


class TarIndex:
    """The samples of a tar and their files. Names, offsets and sizes are mapped from the cache, if there is one."""

    def __init__(self, path: Path, cache: Path | None) -> None:
        """
        Args:
            path: of the tar, not compressed.
            cache: folder in which the index is kept.

        Raises:
            DataError: the file cannot be read, is no tar, was truncated, or has no sample.
        """
        self.path = path
        try:
            if cache is None:
                self._arrays = _scan(path)
            else:
                self._arrays = computed_once(path, lambda: file_state(path.stat()), cache, "tar", lambda: _scan(path))
        except tarfile.TarError as error:
            remedy = "Copy it again. A compressed tar must be decompressed: its files are read at their offsets."
            raise DataError(f"{path} is not a whole tar file: {error}. {remedy}") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
        if not len(self):
            endings = ", ".join((*TEXT_ENDINGS, *IMAGE_ENDINGS))
            raise DataError(f"{path} has no sample: no file in it ends in {endings}. Check data_path.")
        self.content_hash = self._arrays["digest"].tobytes().decode()
        """sha256 in hex of the names and sizes of all files, and of the content of the texts."""

    def __len__(self) -> int:
        return len(self._arrays["starts"]) - 1

    def members(self, index: int) -> list[Member]:
        """The files of a sample, in the order of the tar."""
        start, stop = self._arrays["starts"][index : index + 2].tolist()
        first, last = self._arrays["name_starts"][[start, stop]].tolist()
        names = self._arrays["names"][first:last].tobytes().split(_NAME_SEPARATOR)[:-1]
        spans = self._arrays["members"][start:stop].tolist()
        return [
            Member(name.decode("utf-8", "surrogateescape"), offset, size)
            for name, (offset, size) in zip(names, spans, strict=True)
        ]


def _scan(path: Path) -> Arrays:
    names, name_starts, digest = bytearray(), [0], hashlib.sha256()
    members: list[tuple[int, int]] = []
    starts: list[int] = []
    previous = ""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (item := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            member = Member(item.name, item.offset_data, item.size)
            if not item.isfile() or member.ending not in TEXT_ENDINGS + IMAGE_ENDINGS or _is_hidden(item.name):
                continue
            key = _key(item.name)
            if key != previous:
                starts.append(len(members))
                previous = key
            members.append((member.offset, member.size))
            encoded = item.name.encode("utf-8", "surrogateescape")
            names += encoded + _NAME_SEPARATOR
            name_starts.append(len(names))
            digest.update(encoded + b"\0%d\0" % item.size)
            if member.ending in TEXT_ENDINGS:
                position = file.tell()
                file.seek(member.offset)
                digest.update(file.read(member.size))
                file.seek(position)
        _check_end(file, tar.offset)
    return {
        "starts": np.array([*starts, len(members)], np.int64),
        "members": np.array(members, np.int64).reshape(-1, 2),
        "name_starts": np.array(name_starts, np.int64),
        "names": np.frombuffer(bytes(names), np.uint8),
        "digest": np.frombuffer(digest.hexdigest().encode(), np.uint8),
    }


def _check_end(file: BinaryIO, offset: int) -> None:
    """tarfile takes a damaged header, or none at all, for the end: what is missing would go unnoticed."""
    file.seek(offset)
    rest = file.read(_MAX_PADDING)
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"it does not end with an empty block at byte {offset}: it was truncated or damaged")
    if rest.strip(b"\0") or file.read(1):
        raise tarfile.ReadError(f"data follows its end at byte {offset}: give tars that were concatenated one by one")


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
