"""A checkpoint from somebody else cannot run code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vlm.training.checkpoint import CheckpointError, load_common, read_metadata


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_hostile_metadata_is_an_error(tmp_path: Path) -> None:
    proof = tmp_path / "code was run"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(proof)))
    with pytest.raises(CheckpointError, match="posix.mkdir, which no checkpoint's metadata needs"):
        read_metadata(tmp_path)
    assert not proof.exists()


def test_hostile_value_inside_metadata_is_an_error(tmp_path: Path) -> None:
    proof = tmp_path / "code was run"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=Hostile(proof))))
    with pytest.raises(CheckpointError, match="mkdir"):
        read_metadata(tmp_path)
    assert not proof.exists()


def test_hostile_common_state_is_an_error(tmp_path: Path) -> None:
    proof = tmp_path / "code was run"
    torch.save({"progress": Hostile(proof)}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match="made to run code"):
        load_common(tmp_path)
    assert not proof.exists()


def test_hostile_object_among_the_tensors_is_an_error(tmp_path: Path) -> None:
    """megatron-core 0.19 keeps the common state in a .distcp file."""
    proof, content = tmp_path / "code was run", io.BytesIO()
    torch.save([Hostile(proof)], content)
    (tmp_path / "__0_0.distcp").write_bytes(content.getvalue())
    key = "common_state/shard_0_1"
    stored = _StorageInfo("__0_0.distcp", 0, len(content.getvalue()))
    metadata = Metadata({key: BytesStorageMetadata()}, storage_data={MetadataIndex(key): stored})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"cannot be read from the \.distcp files"):
        load_common(tmp_path)
    assert not proof.exists()


def test_metadata_of_every_dtype_is_read(tmp_path: Path) -> None:
    stored = {
        str(dtype): TensorStorageMetadata(TensorProperties(dtype), torch.Size([2]), [])
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn)
    }
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(stored)))
    assert read_metadata(tmp_path).state_dict_metadata == stored


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2])])
def test_damaged_metadata_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="Copy the checkpoint again"):
        read_metadata(tmp_path)
