"""Distributed checkpoints of any layout, read one tensor at a time, without a model and without process groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import megatron_vlm.runtime  # noqa: F401  (a checkpoint's metadata may name megatron.core, which this prepares)
from checkpoint_convert.checkpoint_writer import LAYERS
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.stored import StoredTensors

PARTS = ("vision_model.", "projector.", "image_newline", "language_model.")
"""How the names of a model's own tensors begin; the others of a checkpoint are the optimizer's."""


class CheckpointTensors(StoredTensors):
    """The model's tensors in a distributed checkpoint, of any layout, under the name map's Megatron names."""

    def __init__(self, folder: Path) -> None:
        """`folder` is an iter_* folder. Raises ConversionError where it holds no readable checkpoint."""
        self.folder, self._reader = folder, dcp.FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # pickle raises whatever the bytes happen to mean
            raise ConversionError(
                f"{folder / '.metadata'} cannot be read ({error}): is the checkpoint whole?"
            ) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._places = dict(self._find())

    def _find(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """(name, (key, layer)) of every tensor of the model."""
        for key, stored in self._metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or not key.startswith(PARTS):
                continue
            if LAYERS in key:
                for layer in range(stored.size[0]):
                    yield key.replace(LAYERS, f"{LAYERS}{layer}.", 1), (key, layer)
            else:
                yield key, (key, None)

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[self._places[name][0]]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored(name).size[0 if self._places[name][1] is None else 1 :])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).properties.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        (key, layer), stored = self._places[name], self._stored(name)
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        into = torch.empty(sizes, dtype=self.dtype(name))
        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(item.lengths.numel() for item in items) != into.numel():
            raise ConversionError(
                f"{self.folder} lacks a part of {name}: was a rank's file lost before it was finished?"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Into(into)).wait()
        except Exception as error:  # torch and pickle raise whatever the bytes happen to mean
            raise ConversionError(
                f"{name} cannot be read from {self.folder} ({error}): copy the checkpoint again"
            ) from error
        return into if layer is None else into[0]


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        bounds = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.tensor[tuple(slice(start, start + length) for start, length in bounds)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
