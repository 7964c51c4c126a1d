"""Tensors that lie in files: their shapes are known without reading them, and each is read when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class NamedTensors(Mapping[str, torch.Tensor]):
    """Tensors of which one at a time is in memory, each made when it is asked for.

    A class fills `_places`: what each name stands for. Whether a name is there is asked of that alone; `in`, as a
    Mapping comes with it, would make the tensor.
    """

    _places: dict[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


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

    _places: dict[str, StoredTensors]

    def __init__(self, *sources: StoredTensors) -> None:
        self._places = {name: source for source in sources for name in source}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype(name)


class ChosenTensors(JoinedTensors):
    """The tensors of one source whose names begin with one of some words."""

    def __init__(self, source: StoredTensors, beginnings: tuple[str, ...]) -> None:
        self._places = {name: source for name in source if name.startswith(beginnings)}


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor in a file or in memory."""
    return tensors.shape(name) if isinstance(tensors, StoredTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.dtype:
    """The dtype of a tensor in a file or in memory."""
    return tensors.dtype(name) if isinstance(tensors, StoredTensors) else tensors[name].dtype
