"""Where a run's checkpoints go: a folder that all ranks share, or a prefix in an object store.

Rank 0 prepares, completes, publishes and removes checkpoints; in between, every rank writes its files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron_vlm.data.processing.chat_template import FILE as CHAT_TEMPLATE_FILE
from megatron_vlm.data.processing.tokenizer import chat_template_text
from megatron_vlm.runtime.atomic_files import atomic_file, atomic_folder
from megatron_vlm.runtime.s3 import S3Error, objects
from megatron_vlm.runtime.s3.multipart import abort_uploads, upload_file
from megatron_vlm.runtime.s3.path import S3Path, StoragePath, storage_path
from megatron_vlm.training.checkpoint.folder import (
    INCOMPLETE,
    RECIPE,
    TRACKER,
    checkpoint_name,
    checkpoint_path,
    is_whole,
    named_checkpoints,
    old_iterations,
    publish,
    recover,
    remove_old,
)

logger = logging.getLogger(__name__)

_PROBE = ".write-check"


class Destination(Protocol):
    """The save folder of a run, as its rank 0 changes it."""

    def recover(self) -> None:
        """Tidy up after a run that was killed; called at the start, before anyone looks."""

    def begin(self, iteration: int) -> StoragePath:
        """Where to write the files of a checkpoint."""

    def empty(self, unfinished: StoragePath) -> None:
        """Remove what a killed run left there; called before any rank writes."""

    def write(self, path: StoragePath, data: bytes) -> None:
        """Write a small file, whole or not at all."""

    def publish(self, unfinished: StoragePath, iteration: int) -> StoragePath:
        """Everything is written, recipe.json last: give it its name and let the tracker name it."""

    def remove_old(self, keep_latest: int | None, keep_every: int | None) -> None:
        """Remove the checkpoints of `folder.old_iterations`."""

    def discard(self, unfinished: StoragePath) -> None:
        """Remove what was written of a checkpoint that failed."""

    def keep_tokenizer(self, source: Path, chat_template: str) -> None:
        """Copy a tokenizer, a folder or a file, into `tokenizer/`, if it is not there: a checkpoint is of no use
        without it.

        A folder gets the template trained with, whatever it had: the engine and exports find it there.
        """


def destination_of(folder: str) -> Destination:
    """The destination that `training.save` names."""
    path = storage_path(folder)
    return S3Destination(path) if isinstance(path, S3Path) else LocalDestination(path)


class LocalDestination:
    """A folder on a disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recover(self) -> None:
        recover(self.folder)

    def begin(self, iteration: int) -> Path:
        target = checkpoint_path(self.folder, iteration)
        return target.with_name(target.name + INCOMPLETE)

    def empty(self, unfinished: StoragePath) -> None:
        self.discard(unfinished)
        Path(str(unfinished)).mkdir(parents=True)

    def write(self, path: StoragePath, data: bytes) -> None:
        with atomic_file(Path(str(path))) as file:
            file.write(data)

    def publish(self, unfinished: StoragePath, iteration: int) -> Path:
        return publish(Path(str(unfinished)), iteration)

    def remove_old(self, keep_latest: int | None, keep_every: int | None) -> None:
        remove_old(self.folder, keep_latest, keep_every)

    def discard(self, unfinished: StoragePath) -> None:
        shutil.rmtree(str(unfinished), ignore_errors=True)

    def keep_tokenizer(self, source: Path, chat_template: str) -> None:
        kept = self.folder / "tokenizer"
        if kept.exists() or not source.exists():
            return
        with atomic_folder(kept) as staging_dir:
            if source.is_dir():
                shutil.copytree(source, staging_dir, dirs_exist_ok=True)
                template = chat_template_text(source, chat_template)
                (staging_dir / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
            else:
                shutil.copy(source, staging_dir)


class S3Destination:
    """A prefix in an object store, which cannot rename.

    Files are written under their final names; recipe.json, which is written last, makes them a checkpoint. An iteration
    that is saved again goes into a prefix of its own, so that the older checkpoint stays whole until the new one is.
    """

    def __init__(self, folder: S3Path) -> None:
        self.folder = folder
        self._to_discard: list[S3Path] = []

    def recover(self) -> None:
        """Nothing is ever half renamed. A run that cannot write must not find out after an hour of training."""
        (self.folder / _PROBE).write_bytes(b"")
        objects.remove(str(self.folder / _PROBE))

    def begin(self, iteration: int) -> S3Path:
        whole = [number for number, path in self._saves_of(iteration) if is_whole(path)]
        name = checkpoint_name(iteration)
        return self.folder / (f"{name}.{max(whole) + 1}" if whole else name)

    def _saves_of(self, iteration: int) -> list[tuple[int, S3Path]]:
        found = named_checkpoints(self.folder)
        return [(number, path) for i, number, path in found if i == iteration and isinstance(path, S3Path)]

    def empty(self, unfinished: StoragePath) -> None:
        self._to_discard = [path for path in self._to_discard if path != unfinished]
        self._remove(S3Path(str(unfinished)))
        try:
            abort_uploads(str(unfinished))
        except S3Error as error:
            logger.warning("%s. Parts of killed uploads stay until the store's life-cycle rule removes them", error)

    def write(self, path: StoragePath, data: bytes) -> None:
        objects.write(data, str(path))

    def publish(self, unfinished: StoragePath, iteration: int) -> S3Path:
        published = S3Path(str(unfinished))
        self.write(self.folder / TRACKER, str(iteration).encode())
        self._try_to_remove(lambda: [path for _, path in self._saves_of(iteration) if path != published])
        return published

    def remove_old(self, keep_latest: int | None, keep_every: int | None) -> None:
        def paths() -> list[S3Path]:
            old = old_iterations(self.folder, keep_latest, keep_every)
            return [path for iteration in old for _, path in self._saves_of(iteration)]

        self._try_to_remove(paths)

    def discard(self, unfinished: StoragePath) -> None:
        self._to_discard.append(S3Path(str(unfinished)))
        self._try_to_remove(list)

    def _try_to_remove(self, find: Callable[[], list[S3Path]]) -> None:
        """What `find` returns, and what could not be removed before. No save has failed because an older one stays."""
        try:
            self._to_discard += find()
            while self._to_discard:
                self._remove(self._to_discard[0])
                self._to_discard.pop(0)
        except S3Error as error:
            logger.warning("what is not needed any more stays until the next checkpoint: %s", error)

    def _remove(self, checkpoint: S3Path) -> None:
        objects.remove(str(checkpoint / RECIPE))  # stopped in the middle, it must not look whole
        objects.remove_folder(str(checkpoint))

    def keep_tokenizer(self, source: Path, chat_template: str) -> None:
        if not source.exists():
            return
        folder = self.folder / "tokenizer"
        kept = set(objects.list_names(str(folder)))
        paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        files = {path.name if path == source else str(path.relative_to(source)): path for path in paths}
        if source.is_dir():
            files.pop(CHAT_TEMPLATE_FILE, None)
            if CHAT_TEMPLATE_FILE not in kept:
                self.write(folder / CHAT_TEMPLATE_FILE, chat_template_text(source, chat_template).encode())
        for name in files.keys() - kept:
            upload_file(files[name], str(folder / name))
