"""The folder that a command writes: checked before any work, and there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint_convert.errors import ConversionError
from megatron_vlm.runtime.atomic_files import atomic_folder, is_absent_or_empty


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A staging folder that becomes `target` when the block ends without an error, as in `atomic_folder`.

    Raises ConversionError if `target` exists and is not an empty folder: nothing of a user's is overwritten.
    """
    if not is_absent_or_empty(target):
        raise ConversionError(f"{target} already exists and is not empty; give another --save folder, or remove it")
    with atomic_folder(target) as staging_dir:
        yield staging_dir


def check_space(folder: Path, needed: int) -> None:
    """Raise ConversionError where the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"no space in {folder.parent}: {needed / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free"
        )
