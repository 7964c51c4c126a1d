"""`.metadata` of a checkpoint, read without running what somebody may have put into it.

torch's own reader unpickles the file without limits, and a pickle can call any function. Here only the classes that
such metadata is made of are looked up; anything else is an error.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_vlm.runtime.s3 import S3Error
from megatron_vlm.runtime.s3.path import StoragePath
from megatron_vlm.training.checkpoint.errors import CheckpointError

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "slice"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata needs")


def read_metadata(checkpoint: StoragePath) -> Metadata:
    """The metadata of an iter_* folder.

    Raises:
        CheckpointError: the file is absent, damaged, or holds something else than metadata.
    """
    path = checkpoint / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {checkpoint} is no whole checkpoint. Copy it again") from None
    except S3Error as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # pickle raises whatever the bytes happen to mean
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged, or was made to run code. Copy the checkpoint again from "
            "a source that you trust"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{path} holds no checkpoint metadata. Copy the checkpoint again")
    return metadata


class TrustedReader(FileSystemReader):
    """torch's reader of checkpoint files, with `read_metadata` of this module."""

    def __init__(self, checkpoint: StoragePath) -> None:
        super().__init__(checkpoint if isinstance(checkpoint, Path) else str(checkpoint))
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(self._checkpoint)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
