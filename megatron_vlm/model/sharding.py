"""The names and places of this rank's tensors in the whole model: what checkpoints, first weights and tests go by."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

CHECKPOINT_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The only optimizer format that loads in another layout."""


def sharding_metadata() -> dict[str, Any]:
    """What megatron-core's sharded_state_dict calls are told."""
    return {**CHECKPOINT_FORMAT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def model_sharded_state_dict(model: Any) -> ShardedStateDict:
    """Sharded state of a model chunk, wrapped or not, under layout-independent names."""
    return unwrap(model).sharded_state_dict(metadata=sharding_metadata())


def count_tensor_replicas(state: ShardedStateDict) -> ShardedStateDict:
    """Number the copies of a tower that is whole on every tensor rank, so that one rank writes it and not all.

    Its layers were built in a tensor group of one and each copy believes that it is the only one.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    for tensor in state.values():
        if hasattr(tensor, "replica_id"):
            pipeline, _, data = tensor.replica_id
            tensor.replica_id = (pipeline, rank, data)
    return state


def unwrap(model: torch.nn.Module) -> Any:
    """The model inside DDP."""
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model


def mark_split_weights(model: torch.nn.Module) -> None:
    """Say which weights are split over tensor ranks: the gradient norm counts all others on one tensor rank alone.

    megatron-core says it while it draws first weights, which we do ourselves; left unsaid, the norm under tensor
    parallelism is that of the first rank's shards (2.31 for 3.06 in the test model) and clipping is silently wrong.
    """
    for module in model.modules():
        split: int | None = None
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            split = 0
        elif isinstance(module, RowParallelLinear):
            split = 1
        # megatron-core 0.19 says it at once, 0.16 only while drawing
        if split is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=split, stride=1)
