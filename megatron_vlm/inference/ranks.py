"""Generation on the ranks of a parallel layout: one rank schedules and samples, every rank runs each step's plan.

Every data-parallel rank is a copy of the model with an engine of its own. The engines know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vlm.config import ConfigError
from megatron_vlm.config.inference import InferenceConfig
from megatron_vlm.inference.model_runner import ModelRunner
from megatron_vlm.inference.sizes import cache_bytes, num_blocks
from megatron_vlm.inference.step_plan import StepPlan
from megatron_vlm.model.vlm import VisionLanguageModel

_IDLE_TIMEOUT = timedelta(days=365)
"""Ranks wait for the next plan as long as no request comes. If the engine's rank exits, its closed connection ends the
wait."""


def _ranks_of_copy() -> list[int]:
    """The tensor, context and pipeline ranks that hold this rank's copy of the model."""
    stage = dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group())
    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    return sorted(rank + stage_rank - dist.get_rank() for rank in stage for stage_rank in stages)


def engine_rank() -> int:
    """The rank with the engine of this rank's copy of the model: rank 0 without data parallelism."""
    return _ranks_of_copy()[0]


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended; backends have no common class for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class PlanChannel:
    """Broadcasts plans from the engine's rank to the others of its copy, over gloo. All ranks create it together."""

    def __init__(self, timeout: timedelta = _IDLE_TIMEOUT) -> None:
        """`timeout`: how long ranks wait for the next plan."""
        self._group, self._source = None, engine_rank()
        ours = _ranks_of_copy()
        if len(ours) == 1:
            return
        copies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(copies, tuple(ours))
        for ranks in sorted(set(copies)):  # every rank of the world takes part in creating every group
            group = dist.new_group(ranks, timeout=timeout, backend="gloo")
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


def prepare_rank(
    chunks: Sequence[VisionLanguageModel],
    config: InferenceConfig,
    channel: PlanChannel | None = None,
    only_inference: bool = False,
) -> tuple[PlanChannel, ModelRunner, int]:
    """What every rank needs for generation, and the number of blocks of the cache; every rank calls this.

    Args:
        chunks: the model chunks of this rank.
        config: sizes of the engine.
        channel: an earlier one; default: a new one.
        only_inference: no model is trained in this process group; see ModelRunner.

    Raises:
        ConfigError: the cache is too small for a block, or CUDA graphs cannot be used here.
    """
    channel = channel or PlanChannel()
    blocks = channel.minimum(num_blocks(chunks, config))
    if blocks < 2:
        raise ConfigError(
            "inference_dynamic_batching_buffer_size_gb = "
            f"{config.inference_dynamic_batching_buffer_size_gb}: {cache_bytes(config) / 2**30:.2g} GiB on this rank "
            f"are too small for two blocks of {config.inference_dynamic_batching_block_size} tokens. Make it larger, "
            "or the blocks smaller."
        )
    return channel, ModelRunner(chunks, config, blocks, engine_rank(), only_inference), blocks


def serve_rank(
    chunks: Sequence[VisionLanguageModel],
    config: InferenceConfig,
    channel: PlanChannel | None = None,
    only_inference: bool = False,
) -> None:
    """Run the engine's plans on another rank of its copy of the model, until the engine is closed."""
    channel, runner, _ = prepare_rank(chunks, config, channel, only_inference)
    while (plan := channel.broadcast()) is not None:
        runner.run(plan)
