"""Sends a batch from the worker that built it to the trainer.

torch would copy every tensor into a shared-memory segment of its own, open a connection for each, and take a page fault
on every page that the worker writes. Here the small tensors go through the queue as bytes. The tiles are written to an
in-memory file (memfd) in one call, which the trainer maps. Nothing is stored in /dev/shm, which is small in containers.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

from megatron_vlm.data.rows.rank_batch import AnyBatch
from megatron_vlm.data.rows.tensor_tree import map_leaves


class SharedBatch:
    """A batch that unpickles as one with the same values, in writable memory. It can be pickled once."""

    def __init__(self, batch: AnyBatch) -> None:
        """Write the tiles to a file and serve its descriptor. An error raised here can be caught; one raised while
        pickling, in the queue's thread, would leave the trainer waiting.

        Raises:
            OSError: out of memory, or multiprocessing's folder for sockets was removed.
        """
        tiles = batch.tiles
        self._batch = map_leaves(replace(batch, tiles=None), torch.Tensor, torch.Tensor.numpy)
        self._shape = None if tiles is None else tuple(tiles.shape)
        self._descriptor = _serve(_write(tiles)) if tiles is not None and tiles.numel() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self._batch, self._shape, self._descriptor)


def _write(tiles: torch.Tensor) -> int:
    """Write tiles to an in-memory file, which exists as long as a process has it open or mapped."""
    file = os.memfd_create("tiles")
    remaining = memoryview(tiles.numpy().data).cast("B")
    try:
        while len(remaining):
            remaining = remaining[os.write(file, remaining) :]
    except OSError:
        os.close(file)
        raise
    return file


def _serve(file: int) -> Any:
    """Close the file in this process. Another process can open it once, with `detach()` of the returned object."""
    try:
        return reduction.DupFd(file)
    finally:
        os.close(file)


def _receive(batch: AnyBatch, shape: tuple[int, ...] | None, descriptor: Any) -> AnyBatch:
    tiles = None
    if shape is not None and descriptor is None:
        tiles = torch.empty(shape, dtype=torch.uint8)
    elif shape is not None:
        file = descriptor.detach()
        try:
            pixels = np.frombuffer(mmap.mmap(file, 0), np.uint8)  # mapping and file exist as long as the tensor
        finally:
            os.close(file)
        tiles = torch.from_numpy(pixels.reshape(shape))
    return replace(map_leaves(batch, np.ndarray, torch.from_numpy), tiles=tiles)
