"""Process groups: megatron-core's, and those of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)

# isort: split
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.config import ParallelConfig


@dataclass(frozen=True)
class ParallelRanks:
    """Rank of this process in each parallel dimension, and the data-parallel size."""

    tensor: int
    pipeline: int
    context: int
    data: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline == 0

    @property
    def is_row_leader(self) -> bool:
        """Whether this is the one rank among those of its stage that hold the same row (tensor and context rank 0)."""
        return self.tensor == 0 and self.context == 0

    def __str__(self) -> str:
        return f"dp{self.data} pp{self.pipeline} cp{self.context} tp{self.tensor}"


def initialize_groups(parallel: ParallelConfig, timeout_minutes: int = 10) -> None:
    """Create megatron-core's process groups, whose collectives wait for `timeout_minutes` at most.

    The world size must be a multiple of `parallel.model_parallel_size`.
    """
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=timeout_minutes,
    )


def destroy_groups() -> None:
    """Destroy megatron-core's process groups, so that others can be created. Every rank calls this.

    megatron-core's own function drops most groups without destroying them. Each gloo group has threads that wake 100
    times per second: after 30 layouts in one process they used more than half of the CPU.
    """
    dist.barrier()
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None is the default group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def parallel_ranks() -> ParallelRanks:
    """The ranks of this process in megatron-core's current process groups."""
    return ParallelRanks(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def tile_shard_rank(parallel: ParallelConfig) -> tuple[int, int]:
    """(rank, size) in the group over which the tiles of a row are sharded.

    With `vision_parallel: data` that is the tensor x context group. With `tensor`, all tensor ranks compute the same
    tile, and the group is the context group.
    """
    if parallel.vision_parallel == "tensor":
        return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    group = parallel_state.get_tensor_and_context_parallel_group()
    return dist.get_rank(group), dist.get_world_size(group)


def vision_groups(parallel: ParallelConfig) -> ProcessGroupCollection:
    """Process groups of the vision tower: its own rank alone, or with `vision_parallel: tensor` the tensor group."""
    # Without experts, the expert-parallel group has this rank alone.
    alone = parallel_state.get_expert_model_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group() if parallel.vision_parallel == "tensor" else alone
    return ProcessGroupCollection(tp=tensor, cp=alone, pp=alone)
