"""Tensor- and pipeline-parallel generation: rank 0 schedules and samples, every rank runs each step's plan."""

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
"""Ranks wait for the next plan as long as no request comes. If rank 0 exits, its closed connection ends the wait."""


class PlanChannel:
    """Broadcasts plans from rank 0 to all other ranks, over gloo. Every rank creates it at the same time."""

    def __init__(self) -> None:
        self._group = None
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)

    def broadcast(self, plan: StepPlan | None = None) -> StepPlan | None:
        """Rank 0 gives a plan, or None to end the other ranks' loops; every rank returns it."""
        if self._group is None:
            return plan
        sent: list[Any] = [plan]
        dist.broadcast_object_list(sent, src=0, group=self._group)
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
        ConfigError: the ranks hold more than one copy of the model, or the cache is too small for a block.
    """
    copy = parallel_state.get_tensor_model_parallel_world_size()
    copy *= parallel_state.get_pipeline_model_parallel_world_size()
    if dist.get_world_size() != copy or model.vp_stage is not None:
        raise ConfigError(
            f"world size = {dist.get_world_size()}: generation needs tensor x pipeline parallel size = {copy} "
            "processes, without context, data or virtual pipeline parallelism. For more copies of the model, start "
            "more engines."
        )
    channel = PlanChannel()
    num_blocks = channel.minimum(_num_blocks(model, config))
    if num_blocks < 2:
        raise ConfigError(
            "inference_dynamic_batching_buffer_size_gb = "
            f"{config.inference_dynamic_batching_buffer_size_gb}: too small for two blocks of "
            f"{config.inference_dynamic_batching_block_size} tokens. Make it larger, or the blocks smaller."
        )
    return channel, ModelRunner(model, config, num_blocks), num_blocks


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
    """Run the plans of rank 0's engine on another rank, until the engine is closed."""
    channel, runner, _ = prepare_rank(model, config)
    while (plan := channel.broadcast()) is not None:
        runner.run(plan)
