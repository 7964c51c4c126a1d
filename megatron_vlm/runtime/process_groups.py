"""Process groups: megatron-core's, and the ones the vision tower needs beside them."""

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
    """Where this process stands in the grid; what a log line and a data loader need to know."""

    tensor: int
    pipeline: int
    context: int
    data: int
    tensor_size: int
    pipeline_size: int
    context_size: int
    data_size: int

    @property
    def first_stage(self) -> bool:
        return self.pipeline == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline == self.pipeline_size - 1

    @property
    def is_row_leader(self) -> bool:
        """One rank of each stage speaks for all that hold the same row."""
        return self.tensor == 0 and self.context == 0

    def __str__(self) -> str:
        return f"dp{self.data} pp{self.pipeline} cp{self.context} tp{self.tensor}"


def initialize_groups(parallel: ParallelConfig) -> None:
    """Build megatron-core's process groups for this layout. The world must be a multiple of the model-parallel size."""
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
    )


def destroy_groups() -> None:
    """End megatron-core's groups, so that others can be built; every rank calls this when none is in use any more.

    megatron-core forgets most of its groups without closing them, and each one of gloo's keeps threads that wake a
    hundred times a second: after thirty layouts in one process they took more than half of the CPU.
    """
    dist.barrier()
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # stands for the whole world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def parallel_ranks() -> ParallelRanks:
    """This process's place in the current grid."""
    return ParallelRanks(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def tile_shard_rank(parallel: ParallelConfig) -> tuple[int, int]:
    """(rank, size) among the ranks that tiles of a row are dealt to.

    A whole tower (`data`) encodes on every rank of the tensor x context group; a split one (`tensor`) needs all its
    tensor ranks for one tile, so that only context ranks share the tiles out.
    """
    if parallel.vision_parallel == "tensor":
        return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    group = parallel_state.get_tensor_and_context_parallel_group()
    return dist.get_rank(group), dist.get_world_size(group)


def vision_groups(parallel: ParallelConfig) -> ProcessGroupCollection:
    """Groups the tower's layers are built with: never pipeline or context, tensor only where it is split."""
    # The expert-parallel group of a model without experts holds this rank alone: no need to make another.
    alone = parallel_state.get_expert_model_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group() if parallel.vision_parallel == "tensor" else alone
    return ProcessGroupCollection(tp=tensor, cp=alone, pp=alone)
