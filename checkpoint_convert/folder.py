"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from checkpoint_convert.errors import ConversionError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A sibling folder to fill, renamed to `target` when the block ends well and removed when it does not.

    Raises ConversionError if `target` exists and is not an empty folder: nothing of a user's is overwritten. A disk
    that cannot be written is an OSError that names `target`.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} already exists and is not empty; give another --save folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{target.name}.making-"
    for left in sorted(path for path in target.parent.iterdir() if path.name.startswith(beginning)):
        print(f"note: {left} is left of a conversion that was killed, unless one runs now; remove it", file=sys.stderr)
    making = target.with_name(beginning + uuid.uuid4().hex[:8])  # not a process id: containers give the same ones
    making.mkdir()
    try:
        yield making
        os.replace(making, target)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # a write does not say where
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raise ConversionError where the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"no space in {folder.parent}: {needed / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free"
        )
