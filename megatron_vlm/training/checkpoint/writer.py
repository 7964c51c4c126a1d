"""torch's writer of checkpoint files, into a folder or an object store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megatron_vlm.runtime.s3 import S3Error
from megatron_vlm.runtime.s3.path import S3Path, StoragePath
from megatron_vlm.training.checkpoint.destination import Destination
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.s3_storage import S3FileSystem


class ShardWriter(dcp.FileSystemWriter):
    """Empties the target first; files are stored when a rank says that it is done."""

    def __init__(self, target: StoragePath, destination: Destination, write_logs: Callable[[], None]) -> None:
        """
        Args:
            target: where the files of this checkpoint go.
            destination: that it is in.
            write_logs: called when this rank has written its share.
        """
        super().__init__(str(target), sync_files=isinstance(target, Path))
        if isinstance(target, S3Path):
            self.fs, self.path = S3FileSystem(), str(target)
        self.target, self._destination, self._write_logs = target, destination, write_logs

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # The coordinator alone runs this, when every rank has planned and before any writes.
        self._destination.empty(self.target)
        return list(super().prepare_global_plan(plans))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            written = super().write_data(plan, planner)
            self._write_logs()
        except Exception as error:  # its cause would be lost on the way to the other ranks
            raise CheckpointError(reason(error)) from error
        return written

    def finish(self, metadata: Metadata, results: Any) -> None:
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                covered = sum(chunk.sizes.numel() for chunk in stored.chunks)
                if covered != stored.size.numel():
                    raise CheckpointError(f"{key}: ranks wrote {covered} of its {stored.size.numel()} values")
        super().finish(metadata, results)


def reason(error: BaseException) -> str:
    """What the operating system or the store said, where it did: torch wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, S3Error):
            return str(cause)
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}" + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}".splitlines()[0]
