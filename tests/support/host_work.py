"""Counts what a process computes on the host with tensors as long as a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOVES = ("aten._to_copy", "aten.copy_", "aten.pin_memory", "aten._pin_memory", "aten.detach", "aten.lift_fresh")
"""Operations that send a tensor to a device or name it again, and compute nothing."""


class RowLongHostWork(TorchDispatchMode):
    """Lists in `found` the operations on CPU tensors that have a dimension of one of `lengths`."""

    def __init__(self, lengths: Iterable[int]) -> None:
        super().__init__()
        self.lengths, self.found = set(lengths), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        on_host = any(tensor.device.type == "cpu" and self.lengths & set(tensor.shape) for tensor in tensors)
        moves = str(func).startswith(_MOVES)
        if on_host and not moves:
            self.found.append(str(func))
        return result
