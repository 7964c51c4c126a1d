"""Names and offsets of this rank's tensors in the whole model, for checkpoints, initial weights and tests."""

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
"""The only optimizer format that can be loaded in another parallel layout."""


def sharding_metadata() -> dict[str, Any]:
    """The `metadata` argument of megatron-core's sharded_state_dict methods."""
    return {**CHECKPOINT_FORMAT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def model_sharded_state_dict(model: Any) -> ShardedStateDict:
    """Sharded state of a model chunk, wrapped in DDP or not, under names that do not depend on the parallel layout."""
    return unwrap(model).sharded_state_dict(metadata=sharding_metadata())


def set_tensor_replica_ids(state: ShardedStateDict) -> ShardedStateDict:
    """Set the replica ids of a vision tower that is replicated on all tensor ranks, so that only one of them writes it.

    The tower was built in a tensor group of one, so every copy has replica id 0. Changes `state` in place.
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


def mark_tensor_parallel_weights(model: torch.nn.Module) -> None:
    """Mark weights that are sharded over tensor ranks; the gradient norm counts all others on one tensor rank only.

    megatron-core 0.16 marks them while it initialises weights, which initialize.py does instead. Without the mark, the
    gradient norm under tensor parallelism is that of the first rank's shards (2.31 instead of 3.06 in the test model),
    and clipping is silently wrong.
    """
    for module in model.modules():
        dim: int | None = None
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        # megatron-core 0.19 has marked them already
        if dim is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
