"""Files and folders that appear under their name whole or not at all.

Each is written beside its target under a hidden temporary name, synced to the disk, and renamed. An error removes the
temporary; a killed process leaves it, never a partial target.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file for writing bytes that replaces `target` when the block ends without an error.

    Several processes may do this at once: the last one to finish wins. The parent folder is created.

    Raises:
        OSError: the disk cannot be written; names `target` where the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target, "partial")
    with _removed_on_error(temporary, target):
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    sync(target.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Create a staging folder that is renamed to `target` when the block ends without an error.

    Staging folders that killed processes left beside `target` are reported on stderr and kept: a running process may
    own them. The parent folder is created.

    Raises:
        FileExistsError: `target` exists and is not an empty folder; nothing is overwritten.
        OSError: the disk cannot be written; names `target` where the disk is full.
    """
    target = target.absolute()
    if not is_absent_or_empty(target):
        raise FileExistsError(errno.EEXIST, "already exists and is not an empty folder", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging_dir = _temporary_name(target, "staging")
    prefix = staging_dir.name.rpartition("-")[0]
    for leftover in sorted(path for path in target.parent.iterdir() if path.name.startswith(f"{prefix}-")):
        print(f"note: {leftover} was left by a process that was killed; remove it if no other runs", file=sys.stderr)
    staging_dir.mkdir()
    with _removed_on_error(staging_dir, target):
        yield staging_dir
        for folder, _, names in os.walk(staging_dir):
            for path in (*(Path(folder, name) for name in names), Path(folder)):
                sync(path)
        os.replace(staging_dir, target)
    sync(target.parent)


def is_absent_or_empty(folder: Path) -> bool:
    """Whether a new folder may take this name: there is nothing, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _temporary_name(target: Path, purpose: str) -> Path:
    # A random number, not the process id: containers that share a disk have the same ids.
    return target.with_name(f".{target.name}.{purpose}-{uuid.uuid4().hex[:8]}")


@contextmanager
def _removed_on_error(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error  # write() does not name the file
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
