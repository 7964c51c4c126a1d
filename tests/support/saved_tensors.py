"""Bytes that autograd keeps for backward passes, counted by hooks."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch


class _Saved:
    """What a node of the graph holds in place of a tensor; it ends with the node."""

    def __init__(self, tensor: torch.Tensor, counter: SavedTensors) -> None:
        self.tensor, self._counter = tensor, counter
        self.address = tensor.untyped_storage().data_ptr()
        counter.add(self.address, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self._counter.remove(self.address)


class SavedTensors:
    """Counts what is kept for backward by nodes that are made inside the block, for as long as they exist.

    Several views of one storage count once, and storages in `ignored` not at all: parameters, which are there anyway.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._users: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor
        )
        self.bytes = 0
        """Kept now."""
        self.peak = 0

    def add(self, address: int, size: int) -> None:
        self._users[address] = self._users.get(address, 0) + 1
        if self._users[address] == 1:
            self._sizes[address] = 0 if address in self._ignored else size
            self.bytes += self._sizes[address]
            self.peak = max(self.peak, self.bytes)

    def remove(self, address: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            self.bytes -= self._sizes.pop(address)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._hooks.__exit__(*error)
