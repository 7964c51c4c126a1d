"""How the model is laid out over processes, in Megatron-LM's own flag names."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_vlm.config.errors import ConfigError


@dataclass
class ParallelConfig:
    """Parallel degrees. Data parallelism is what is left of the world; TP > 1 always means sequence parallel."""

    tensor_model_parallel_size: int = field(default=1, metadata={"help": "ranks a layer is split over"})
    pipeline_model_parallel_size: int = field(default=1, metadata={"help": "stages"})
    virtual_pipeline_model_parallel_size: int = field(
        default=1, metadata={"help": "model chunks per stage; above 1 the schedule is interleaved"}
    )
    context_parallel_size: int = field(default=1, metadata={"help": "ranks a row is split over (Ulysses)"})
    vision_parallel: str = field(
        default="data",
        metadata={
            "choices": ("data", "tensor"),
            "help": "data: whole tower on every rank, tiles dealt out; tensor: split over tensor ranks",
        },
    )
    use_distributed_optimizer: bool = field(default=True, metadata={"help": "shard optimizer state over data ranks"})
    overlap_grad_reduce: bool = field(default=False, metadata={"help": "reduce gradients while backward runs"})
    overlap_param_gather: bool = field(default=False, metadata={"help": "gather parameters while forward runs"})

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one copy of the model and one row."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor_model_parallel_size > 1

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a world of that many processes. Raises ConfigError where the world does not divide."""
        copies, rest = divmod(world_size, self.model_parallel_size)
        if rest or not copies:
            raise ConfigError(
                f"world size = {world_size}: not a multiple of the {self.model_parallel_size} processes that hold one "
                f"copy of the model. Start a multiple of {self.model_parallel_size} processes."
            )
        return copies
