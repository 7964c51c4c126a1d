"""Which checkpoint a run resumes from: rank 0 decides, and every rank must see it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.runtime.s3 import S3Error
from megatron_vlm.runtime.s3.path import StoragePath, storage_path
from megatron_vlm.training.checkpoint.destination import destination_of
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import is_whole, latest_checkpoint, require_checkpoint

_VISIBLE_AFTER = 30.0
"""Seconds that a network file system may take to show a rank what another one wrote."""


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Errors of an object store name the setting whose value it is."""
    try:
        yield
    except S3Error as error:
        raise CheckpointError(f"{setting}: {error}") from error


def checkpoint_to_resume(save: str | None, load: str | None) -> StoragePath | None:
    """The checkpoint that every rank of a run resumes from; None for a new run. A collective call.

    A checkpoint in `save` comes first: a run that was started with `load` and is started again resumes its own work.

    Args:
        save: the folder or s3:// prefix that the run saves into.
        load: another run's save folder, or the same one.

    Raises:
        CheckpointError: no checkpoint is whole, `load` has none, or this rank does not see it; on every rank.
    """
    decided: list[StoragePath | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            if save is not None:
                with naming("training.save"):
                    destination_of(save).recover()
            decided = [choose_checkpoint(save, load)]
        except CheckpointError as error:
            decided = [error]
    dist.broadcast_object_list(decided, src=0)
    (found,) = decided
    if isinstance(found, CheckpointError):
        raise found
    if found is not None:
        _wait_until_visible(found)
    return found


def choose_checkpoint(save: str | None, load: str | None) -> StoragePath | None:
    """As `checkpoint_to_resume`, on this process alone and without a change to `save`."""
    if save is not None:
        with naming("training.save"):
            found = latest_checkpoint(save)
        if found is not None:
            return found
    if load is None or (save is not None and _resolved(load) == _resolved(save)):
        return None
    with naming("training.load"):
        return require_checkpoint(load)


def _resolved(folder: str) -> StoragePath:
    path = storage_path(folder)
    return path.resolve() if isinstance(path, Path) else path


def _wait_until_visible(checkpoint: StoragePath) -> None:
    deadline = time.monotonic() + _VISIBLE_AFTER
    rank = f"rank {dist.get_rank()} on {socket.gethostname()}"
    with naming(rank):
        while not is_whole(checkpoint):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{rank} does not see {checkpoint}, from which rank 0 resumes: save must be a folder that all "
                    "nodes share, or an s3:// prefix of the same store"
                )
            time.sleep(0.5)
