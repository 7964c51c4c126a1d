"""megatron-core's gradient buffers, optimizer and learning-rate schedule, built from a recipe."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vlm.config import PARTS, Recipe
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.fused_weight_gradient import fuse_weight_gradients


def wrap_for_data_parallel(chunks: list[VisionLanguageModel], recipe: Recipe) -> list[DistributedDataParallel]:
    """Wrap each chunk in DDP, which allocates the gradient buffers; requires_grad must be set before."""
    parallel = recipe.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    fuse_weight_gradients(chunks, torch.bfloat16 if recipe.training.bf16 else torch.float32)
    config = chunks[0].config
    if parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def _settings_by_part(recipe: Recipe) -> dict[Any, Any]:
    """Learning rate and weight decay of each model part that has its own, in megatron-core's words."""
    training, overrides = recipe.training, {}
    for part in PARTS:
        rate, decay = getattr(training, f"{part}_lr"), getattr(training, f"{part}_weight_decay")
        own: dict[str, float] = {}
        if rate is not None:
            own |= {"max_lr": rate, "min_lr": min(training.min_lr, rate)}
        if decay is not None:
            own |= {"start_wd": decay, "end_wd": decay}
        if own:
            overrides[ParamKey(attr=f"is_{part}")] = own
    return overrides


def synchronize_parameters(chunks: list[Any]) -> None:
    """Give every data-parallel rank the weights of after the last step; all ranks call this.

    With overlap_param_gather a rank gathers them only in the next forward pass: before that it has its own shard of the
    new weights and the old ones of all others. Saving, exporting and evaluating must not read those.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(chunks: list[DistributedDataParallel], recipe: Recipe) -> MegatronOptimizer:
    """megatron-core's optimizer over the trainable parameters, with the recipe's settings for each model part."""
    training = recipe.training
    config = OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        sgd_momentum=training.sgd_momentum,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    # Overrides replace megatron-core's own (no weight decay on biases and norms), so both are passed.
    overrides = {**get_standard_config_overrides(config), **_settings_by_part(recipe)}
    return get_megatron_optimizer(config, chunks, config_overrides=overrides)


def build_schedule(optimizer: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """Linear warmup, then as lr_decay_style says to the last iteration; counted in iterations."""
    training = recipe.training
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.warmup_iters,
        lr_decay_steps=training.train_iters,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=training.wsd_decay_iters if training.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The current learning rate of parameters whose model part has no rate of its own."""
    groups = optimizer.param_groups
    default = [group["lr"] for group in groups if group.get("default_config", True)]
    return float(default[0] if default else groups[0]["lr"])
