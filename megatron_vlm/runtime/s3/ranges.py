"""Many ranges of objects, read in parallel ahead of their use."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_vlm.runtime.s3.objects import read_into

_THREADS = 8
_PIECE_BYTES = 32 << 20
"""Of a long range; one connection is slower than the network."""
_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True)
class ByteRange:
    """A part of an object."""

    url: str
    start: int
    length: int


def read_ranges(ranges: Iterable[ByteRange]) -> Generator[bytearray, None, None]:
    """The content of each range, in order. In memory are at most 256 MiB, the longest range and the one in use.

    Raises:
        S3Error: a range could not be read; the message names its object.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
    pending: deque[tuple[bytearray, list[Future[None]]]] = deque()
    in_memory = 0
    try:
        for wanted in ranges:
            buffer = bytearray(wanted.length)
            starts = range(0, wanted.length, _PIECE_BYTES)
            pending.append((buffer, [pool.submit(_fill, buffer, wanted, start) for start in starts]))
            in_memory += wanted.length
            while in_memory > _AHEAD_BYTES:
                in_memory -= len(pending[0][0])
                yield _filled(*pending.popleft())
        while pending:
            yield _filled(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(buffer: bytearray, wanted: ByteRange, start: int) -> None:
    length = min(_PIECE_BYTES, wanted.length - start)
    read_into(wanted.url, wanted.start + start, memoryview(buffer)[start : start + length])


def _filled(buffer: bytearray, pieces: list[Future[None]]) -> bytearray:
    for piece in pieces:
        piece.result()
    return buffer


class MemoryFile(io.RawIOBase):
    """Bytes as a file, without the copy that io.BytesIO makes of a bytearray."""

    def __init__(self, content: bytearray) -> None:
        self._content, self._position = memoryview(content), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, target: Any) -> int:
        found = self._content[self._position : self._position + len(target)]
        target[: len(found)] = found
        self._position += len(found)
        return len(found)
