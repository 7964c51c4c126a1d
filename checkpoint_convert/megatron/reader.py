"""Reads distributed checkpoints of any parallel layout one tensor at a time, without a model or process groups."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from checkpoint_convert.mapping.param_map import param_map
from checkpoint_convert.megatron.writer import LAYERS
from megatron_vlm.config import ModelConfig
from megatron_vlm.runtime.s3.path import StoragePath, file_size
from megatron_vlm.training.checkpoint import CheckpointError, read_metadata

_MODULES = {entry.megatron.partition(".")[0] for entry in param_map(ModelConfig())}
"""The modules of a model. Other tensors of a checkpoint are the optimizer's."""


class CheckpointTensors(StoredTensors):
    """The model's tensors in a distributed checkpoint, under the parameter map's Megatron names.

    Names, shapes and dtypes are those of a checkpoint on a disk or in an object store; tensors are read from a disk.
    """

    _entries: dict[str, tuple[str, int | None]]
    """Name -> the key in the checkpoint, and the layer's index where layers are stacked under one key."""

    def __init__(self, folder: StoragePath) -> None:
        """`folder` is an iter_* folder. Raises ConversionError if it holds no complete checkpoint."""
        self.folder = folder
        try:
            self._metadata = read_metadata(folder)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
        self._check_files()
        self._entries = dict(self._find())

    def _check_files(self) -> None:
        """Raise ConversionError for a missing or truncated file, before hours are spent on the others."""
        ends: dict[str, int] = {}
        for stored in self._metadata.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            size = file_size(file)
            if size is None or size < end:
                found = "does not exist" if size is None else f"has {size:,} bytes and {end:,} are needed"
                raise ConversionError(f"{file} {found}: copy the checkpoint again")

    def _find(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """(name, (key, layer)) of each tensor of the model."""
        for key, stored in self._metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or key.partition(".")[0] not in _MODULES:
                continue
            if LAYERS in key:
                for layer in range(stored.size[0]):
                    yield key.replace(LAYERS, f"{LAYERS}{layer}.", 1), (key, layer)
            else:
                yield key, (key, None)

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[self._entries[name][0]]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored(name).size[0 if self._entries[name][1] is None else 1 :])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).properties.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        (key, layer), stored = self._entries[name], self._stored(name)
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(item.lengths.numel() for item in items) != box.sizes.numel():
            raise ConversionError(f"{self.folder} lacks a shard of {name}: was the file of a rank lost?")
        parts = (_box(self._chunk(name, item.storage_index), item.storage_offsets, item.lengths) for item in items)
        if len(items) == 1:
            (whole,) = parts
        else:
            whole = torch.empty(sizes, dtype=self.dtype(name))
            for item, part in zip(items, parts, strict=True):
                _box(whole, item.dest_offsets, item.lengths).copy_(part)
        return whole if layer is None else whole[0]

    def _chunk(self, name: str, index: MetadataIndex) -> torch.Tensor:
        """The shard of a tensor that one rank wrote. torch's own reader copies it once more and takes twice as long."""
        stored = self._metadata.storage_data[index]
        file = Path(str(self.folder / stored.relative_path))
        try:
            with file.open("rb") as opened:
                part = cast(BinaryIO, _Slice(opened, stored.offset, stored.length))
                loaded: torch.Tensor = torch.load(part, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch and pickle may raise anything
            raise ConversionError(
                f"{name} cannot be read from {file}: the bytes there are not a tensor. Copy the checkpoint again"
            ) from error
        return loaded


def _box(tensor: torch.Tensor, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    bounds = zip(offsets, lengths, strict=True)
    return tensor[tuple(slice(start, start + length) for start, length in bounds)]


class _Slice(io.RawIOBase):
    """A byte range of a file as a file: a rank writes many tensors to one file, one after the other."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        into = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(into)  # type: ignore[attr-defined]
        self._at += count
        return count
