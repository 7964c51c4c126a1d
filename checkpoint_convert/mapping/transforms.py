"""How Hugging Face tensors become one Megatron tensor, and how it is split again, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Transform(Protocol):
    """`to_hf(to_megatron(tensors))` returns the tensors bit for bit."""

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]


@dataclass(frozen=True)
class InterleaveQKV:
    """q, k, v -> one tensor with, per query group, the group's query heads, its key head and its value head.

    The inputs are weights [rows, in] or biases [rows]; q has heads * head_dim rows, k and v have groups * head_dim.
    In this order tensor-parallel ranks split the rows evenly, each with whole groups.
    """

    heads: int
    groups: int

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        q, k, v = (x.reshape(self.groups, -1, *x.shape[1:]) for x in tensors)
        return torch.cat([q, k, v], dim=1).flatten(0, 1)

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        per_group = self.heads // self.groups
        head_dim = len(tensor) // (self.heads + 2 * self.groups)
        grouped = tensor.reshape(self.groups, (per_group + 2) * head_dim, *tensor.shape[1:])
        parts = grouped.split([per_group * head_dim, head_dim, head_dim], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]


@dataclass(frozen=True)
class StackGateUp:
    """gate, up -> one tensor, the gate's rows first (SwiGLU, arXiv:2002.05202)."""

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [part.contiguous() for part in tensor.chunk(2)]
