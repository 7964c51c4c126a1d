"""Annotation files that are compressed with gzip are decompressed once: entries are read at their byte offsets."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.file_cache import cache_name, file_state
from megatron_vlm.runtime.atomic_files import atomic_file
from megatron_vlm.runtime.file_lock import file_lock

GZIP = ".gz"
_BLOCK = 1 << 20


def open_decompressed(path: Path, cache: Path | None) -> BinaryIO:
    """The content of a `.gz` file, as a file that can be read at any offset.

    Args:
        path: of the compressed file.
        cache: where the copy is kept. It is made again if the compressed file changes. None: the copy is a temporary
            file without a name.

    Raises:
        OSError: `path` cannot be read.
        ValueError: it is not whole, or no gzip file. The text continues "annotation file NAME …".
        DataError: the copy cannot be written.
    """
    if cache is None:
        temporary = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (the caller closes it)
        _decompress(path, temporary, tempfile.gettempdir())
        return temporary
    size, modified = file_state(path.stat()).tolist()
    prefix = cache_name(path)
    copy = cache / f"{prefix}-{size}-{modified}.decompressed"
    try:
        return copy.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        pass
    try:
        with file_lock(cache / f"{prefix}.lock", purpose=f"decompressing {path}"):
            if not copy.exists():
                with atomic_file(copy) as file:
                    _decompress(path, file, cache)
                for old in set(cache.glob(f"{prefix}-*.decompressed")) - {copy}:
                    old.unlink(missing_ok=True)
            return copy.open("rb")
    except OSError as error:
        raise DataError(
            f"annotation file {path} is decompressed to {cache}, which fails: {error}. "
            "Set cache_dir to a writable folder with enough room, or decompress it yourself."
        ) from error


def _decompress(path: Path, target: BinaryIO, folder: str | Path) -> None:
    try:
        with gzip.open(path, "rb") as source:
            shutil.copyfileobj(source, target, _BLOCK)
        target.flush()
    except EOFError:
        raise ValueError("ends before its compressed data does: it was truncated. Copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"is no whole gzip file: {error}") from None
