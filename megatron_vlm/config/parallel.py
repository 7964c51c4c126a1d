"""Settings of the parallel layout, under Megatron-LM's flag names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_vlm.config.errors import ConfigError


@dataclass
class ParallelConfig:
    """Parallel sizes. The data-parallel size follows from the world size; sequence parallelism is on when TP > 1."""

    tensor_model_parallel_size: int = field(
        default=1, metadata={"help": "Tensor-parallel ranks; above 1, sequence parallelism is on too."}
    )
    pipeline_model_parallel_size: int = field(default=1, metadata={"help": "Pipeline stages."})
    virtual_pipeline_model_parallel_size: int = field(
        default=1, metadata={"help": "Model chunks per pipeline stage; above 1, the schedule is interleaved."}
    )
    pipeline_model_parallel_layout: str | None = field(
        default=None,
        metadata={
            "help": "Language layers per stage, such as Et*3|t*4|t*4|t*5L, or auto: about equal cost; default: equally."
        },
    )
    context_parallel_size: int = field(
        default=1, metadata={"help": "Context-parallel ranks that share a row (Ulysses)."}
    )
    vision_parallel: Literal["data", "tensor"] = field(
        default="data",
        metadata={"help": "Vision tower: replicated with sharded tiles (data), or sharded over tensor ranks (tensor)."},
    )
    use_distributed_optimizer: bool = field(
        default=True, metadata={"help": "Shard the optimizer state over data-parallel ranks."}
    )
    num_distributed_optimizer_instances: int = field(
        default=1,
        metadata={
            "help": "Groups of data-parallel ranks, each of which holds the whole optimizer state between its ranks."
        },
    )
    overlap_grad_reduce: bool = field(
        default=False, metadata={"help": "Overlap the reduction of gradients with the backward pass."}
    )
    overlap_param_gather: bool = field(
        default=False, metadata={"help": "Overlap the all-gather of parameters with the forward pass."}
    )
    ddp_bucket_size: int | None = field(
        default=None,
        metadata={"help": "Parameters per gradient bucket when communication overlaps; default: megatron-core's own."},
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline x context parallel."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor_model_parallel_size > 1

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model. Raises ConfigError if `world_size` is not a multiple of `model_parallel_size`."""
        copies, rest = divmod(world_size, self.model_parallel_size)
        if rest or not copies:
            raise ConfigError(
                f"world size = {world_size}: not a multiple of the {self.model_parallel_size} processes that hold one "
                f"copy of the model. Start a multiple of {self.model_parallel_size} processes."
            )
        return copies
