"""Tensors that lie in files: their shapes are known without reading them, and each is read when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch


class StoredTensors(Mapping[str, torch.Tensor]):
    """Named tensors of which one at a time is in memory."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""


class JoinedTensors(StoredTensors):
    """The tensors of several sources, whose names differ."""

    def __init__(self, *sources: StoredTensors) -> None:
        self._source_of = {name: source for source in sources for name in source}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source_of)

    def __len__(self) -> int:
        return len(self._source_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source_of[name].dtype(name)


class ChosenTensors(JoinedTensors):
    """The tensors of one source whose names begin with one of some words."""

    def __init__(self, source: StoredTensors, beginnings: tuple[str, ...]) -> None:
        self._source_of = {name: source for name in source if name.startswith(beginnings)}


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor in a file or in memory."""
    return tensors.shape(name) if isinstance(tensors, StoredTensors) else tuple(tensors[name].shape)
