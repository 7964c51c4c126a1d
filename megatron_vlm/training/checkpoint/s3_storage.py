"""torch's readers and writers of checkpoint files, on an object store."""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from megatron_vlm.runtime.s3 import is_remote, join, objects
from megatron_vlm.runtime.s3.multipart import writing
from megatron_vlm.runtime.s3.path import S3Path, StoragePath
from megatron_vlm.runtime.s3.ranges import ByteRange, MemoryFile, read_ranges
from megatron_vlm.training.checkpoint.trusted_metadata import TrustedReader


class S3FileSystem(FileSystem):
    """What torch asks of a file system to write a checkpoint; a path is an s3:// URL."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode == "wb":
            with writing(str(path)) as stream:
                yield stream
        else:
            yield io.BytesIO()  # S3Reader reads the ranges itself

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        objects.copy(str(path), str(new_path))
        objects.remove(str(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing: a store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_remote(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return objects.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        objects.remove(str(path))


class S3Reader(TrustedReader):
    """Requests the ranges that hold this rank's tensors and no others: in parallel, each once, with bounded memory."""

    def __init__(self, checkpoint: S3Path) -> None:
        super().__init__(checkpoint)
        self.fs, self.path = S3FileSystem(), str(checkpoint)
        self._contents: Iterator[bytearray] = iter(())
        self._current: tuple[ByteRange | None, bytearray] = (None, bytearray())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def stored_at(item: Any) -> tuple[str, int]:
            found = self.storage_data[item.storage_index]
            return found.relative_path, found.offset

        items = sorted(plan.items, key=stored_at)
        wanted = dict.fromkeys(self._range(self.storage_data[item.storage_index]) for item in items)
        contents = read_ranges(wanted)
        self._contents, self._current = contents, (None, bytearray())
        try:
            return super().read_data(replace(plan, items=items), planner)
        finally:
            contents.close()

    def _range(self, stored: Any) -> ByteRange:
        return ByteRange(join(str(self._checkpoint), stored.relative_path), stored.offset, stored.length)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """torch asks in the order of the items: the next range, or the same one for another box of a tensor."""
        wanted = self._range(sinfo)
        if self._current[0] != wanted:
            self._current = (wanted, next(self._contents))
        return cast("IO[bytes]", MemoryFile(self._current[1]))


def checkpoint_reader(checkpoint: StoragePath) -> TrustedReader:
    """A reader for `torch.distributed.checkpoint` that runs no code of the checkpoint's."""
    return S3Reader(checkpoint) if isinstance(checkpoint, S3Path) else TrustedReader(checkpoint)
