"""A batch on its way from the worker that built it to the trainer.

torch would put every tensor into a piece of shared memory of its own, fetched over a connection of its own, and the
worker would fault on every page it writes there. Here the short tensors go through the queue as bytes, and the tiles
into a file in memory, written in one go and mapped by the trainer. Nothing lies in /dev/shm, which containers keep
small.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import fields
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

from megatron_vlm.data.batch import PackedBatch


class SharedBatch:
    """Put into the queue of a worker once; what comes out of it is the PackedBatch, writable, with the same values."""

    def __init__(self, batch: PackedBatch) -> None:
        """Writes the tiles and offers their file. What fails can be caught here; in the queue's thread, which pickles,
        it would leave the trainer waiting.

        Raises:
            OSError: there is no memory for them, or multiprocessing's folder for sockets is gone.
        """
        self._values = {part.name: getattr(batch, part.name) for part in fields(batch)}
        tiles: torch.Tensor | None = self._values.pop("tiles")
        self._shape = None if tiles is None else tuple(tiles.shape)
        self._offered = _offer(_write(tiles)) if tiles is not None and tiles.numel() else None

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = {name: value.numpy() for name, value in self._values.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in self._values.items() if name not in arrays}
        return _receive, (others, arrays, self._shape, self._offered)


def _write(tiles: torch.Tensor) -> int:
    """A file that lives as long as somebody has it open or mapped."""
    file = os.memfd_create("tiles")
    left = memoryview(tiles.numpy().data).cast("B")
    try:
        while len(left):
            left = left[os.write(file, left) :]
    except OSError:
        os.close(file)
        raise
    return file


def _offer(file: int) -> Any:
    """Closes the file here; another process can fetch it once from this one, with what is returned."""
    try:
        return reduction.DupFd(file)
    finally:
        os.close(file)


def _receive(
    others: dict[str, Any], arrays: dict[str, np.ndarray], shape: tuple[int, ...] | None, offered: Any
) -> PackedBatch:
    tiles = None
    if shape is not None and offered is None:
        tiles = torch.empty(shape, dtype=torch.uint8)
    elif shape is not None:
        file = offered.detach()
        try:
            pixels = np.frombuffer(mmap.mmap(file, 0), np.uint8)  # mapping and file live as long as the tensor
        finally:
            os.close(file)
        tiles = torch.from_numpy(pixels.reshape(shape))
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedBatch(**others, **tensors, tiles=tiles)
