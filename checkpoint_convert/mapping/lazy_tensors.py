"""Named tensors that are read or computed one at a time, when they are asked for; shapes are known without reading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class NamedTensors(Mapping[str, torch.Tensor]):
    """Tensors of which only one at a time is in memory.

    A subclass fills `_entries`: name -> what it needs to produce the tensor. `in` looks there, because Mapping's own
    `__contains__` would produce the tensor.
    """

    _entries: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


class StoredTensors(NamedTensors):
    """Named tensors in files."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""


class JoinedTensors(StoredTensors):
    """The tensors of several sources, whose names differ."""

    _entries: dict[str, StoredTensors]

    def __init__(self, *sources: StoredTensors) -> None:
        self._entries = {name: source for source in sources for name in source}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entries[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype(name)


class SelectedTensors(JoinedTensors):
    """The tensors of one source whose names start with one of some prefixes."""

    def __init__(self, source: StoredTensors, prefixes: tuple[str, ...]) -> None:
        self._entries = {name: source for name in source if name.startswith(prefixes)}


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor in a file or in memory."""
    return tensors.shape(name) if isinstance(tensors, StoredTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.dtype:
    """The dtype of a tensor in a file or in memory."""
    return tensors.dtype(name) if isinstance(tensors, StoredTensors) else tensors[name].dtype
