"""Tensor- and pipeline-parallel generation: one rank schedules and samples, every rank runs each step's plan.

Every data-parallel rank is a copy of the model with an engine of its own. The engines know nothing of each other.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vlm.config import ConfigError
from megatron_vlm.config.inference import InferenceConfig
from megatron_vlm.inference.model_runner import ModelRunner
from megatron_vlm.inference.step_plan import StepPlan
from megatron_vlm.model.vlm import VisionLanguageModel

_IDLE_TIMEOUT = timedelta(days=365)
"""Ranks wait for the next plan as long as no request comes. If the engine's rank exits, its closed connection ends the
wait."""


def _ranks_of_copy() -> list[int]:
    """The ranks that hold this rank's copy of the model."""
    return dist.get_process_group_ranks(parallel_state.get_model_parallel_group())


def engine_rank() -> int:
    """The rank with the engine of this rank's copy of the model: rank 0 without data parallelism."""
    return _ranks_of_copy()[0]


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended; backends have no common class for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class PlanChannel:
    """Broadcasts plans from the engine's rank to the others of its copy, over gloo. All ranks create it together."""

    def __init__(self) -> None:
        self._group, self._source = None, engine_rank()
        ours = _ranks_of_copy()
        if len(ours) == 1:
            return
        copies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(copies, tuple(ours))
        for ranks in sorted(set(copies)):  # every rank of the world takes part in creating every group
            group = dist.new_group(ranks, timeout=_IDLE_TIMEOUT, backend="gloo")
            if dist.get_rank() in ranks:
                self._group = group

    def broadcast(self, plan: StepPlan | None = None) -> StepPlan | None:
        """The engine's rank gives a plan, or None to end the other ranks' loops; every rank returns it."""
        if self._group is None:
            return plan
        sent: list[Any] = [plan]
        dist.broadcast_object_list(sent, src=self._source, group=self._group)
        received: StepPlan | None = sent[0]
        return received

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self._group is None:
            return value
        smallest = torch.tensor(value)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self._group)
        return int(smallest)


def max_sequence_length(model: VisionLanguageModel, config: InferenceConfig) -> int:
    """Prompt and generated tokens of a request at most."""
    return config.inference_max_seq_length or model.recipe.model.language.max_position_embeddings


def prepare_rank(model: VisionLanguageModel, config: InferenceConfig) -> tuple[PlanChannel, ModelRunner, int]:
    """What every rank needs for generation, and the number of blocks of the cache; every rank calls this.

    Raises:
        ConfigError: context or virtual pipeline parallelism, or the cache is too small for a block.
    """
    if parallel_state.get_context_parallel_world_size() > 1 or model.vp_stage is not None:
        raise ConfigError(
            "context_parallel_size or virtual_pipeline_model_parallel_size is above 1: generation uses tensor and "
            "pipeline parallelism only. Set both to 1; checkpoints of any layout can be loaded."
        )
    channel = PlanChannel()
    num_blocks = channel.minimum(_num_blocks(model, config))
    if num_blocks < 2:
        raise ConfigError(
            "inference_dynamic_batching_buffer_size_gb = "
            f"{config.inference_dynamic_batching_buffer_size_gb}: too small for two blocks of "
            f"{config.inference_dynamic_batching_block_size} tokens. Make it larger, or the blocks smaller."
        )
    return channel, ModelRunner(model, config, num_blocks, engine_rank()), num_blocks


def _num_blocks(model: VisionLanguageModel, config: InferenceConfig) -> int:
    """Blocks that fit into this rank's buffer; at most twice those of a full batch of the longest sequences."""
    language, block_size = model.recipe.model.language, config.inference_dynamic_batching_block_size
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    heads = max(1, language.num_key_value_heads // tensor_ranks)
    layers = max(1, len(model.language_model.decoder.layers))
    itemsize = next(model.parameters()).element_size()
    block_bytes = 2 * layers * heads * language.head_width * block_size * itemsize
    fitting = int(config.inference_dynamic_batching_buffer_size_gb * 2**30) // block_bytes
    per_request = -(-max_sequence_length(model, config) // block_size)
    return min(fitting, 2 * config.inference_max_requests * per_request + 1)


def serve_rank(model: VisionLanguageModel, config: InferenceConfig) -> None:
    """Run the engine's plans on another rank of its copy of the model, until the engine is closed."""
    channel, runner, _ = prepare_rank(model, config)
    while (plan := channel.broadcast()) is not None:
        runner.run(plan)
