"""The bytes of a training step on a rank, counted, and whether the planner expects them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from megatron_vlm.model.sharding import unwrap

ACTIVATIONS = 0.10
"""|planned / counted - 1|"""
STATE = 0.01
"""The same for parameters, gradients and optimizer state: gradient buffers are padded."""


def weights_of(chunks: Iterable[Any]) -> list[torch.Tensor]:
    """Parameters and buffers of a rank's chunks, wrapped for data parallelism or not."""
    return [*chain.from_iterable(chain(chunk.parameters(), chunk.buffers()) for chunk in map(unwrap, chunks))]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' memory; what several of them share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def gradient_bytes(wrapped: Iterable[Any]) -> int:
    """Of the gradient buffers of chunks that are wrapped for data parallelism."""
    return storage_bytes(buffer.grad_data for chunk in wrapped for buffer in chunk.buffers)


def optimizer_bytes(optimizer: Any, parameters: Iterable[torch.Tensor]) -> int:
    """State tensors and fp32 copies of parameters, without what is the parameters' own memory."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    tensors = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is None:
            continue
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return storage_bytes(
        t for t in tensors if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own
    )


def check_planned(counted: Mapping[str, int], planned: Mapping[str, int], where: str) -> None:
    """Raise AssertionError if a kind of memory is not planned as it was counted."""
    for kind, size in counted.items():
        tolerance = ACTIVATIONS if kind == "activations" else STATE
        assert abs(planned[kind] - size) <= tolerance * size, f"{kind} {where}: {planned[kind]} for {size}"
