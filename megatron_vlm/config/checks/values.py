"""Checks of single settings: sizes below one, numbers out of range, unknown choices."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem
from megatron_vlm.config.recipe import Recipe, Setting, iter_settings
from megatron_vlm.config.values import to_type

AT_LEAST_ONE = (
    "model.vision.hidden_size",
    "model.vision.intermediate_size",
    "model.vision.num_hidden_layers",
    "model.vision.num_attention_heads",
    "model.vision.image_size",
    "model.vision.patch_size",
    "model.language.hidden_size",
    "model.language.intermediate_size",
    "model.language.num_hidden_layers",
    "model.language.num_attention_heads",
    "model.language.num_key_value_heads",
    "model.language.head_dim",
    "model.language.vocab_size",
    "model.language.max_position_embeddings",
    "data.seq_length",
    "data.max_tiles_per_row",
    "data.packing_window",
    "training.train_iters",
    "training.global_batch_size",
    "training.lora_r",
    "training.recompute_num_layers",
    "training.save_interval",
    "training.save_total_limit",
    "training.save_retain_interval",
    "parallel.ddp_bucket_size",
    "parallel.num_distributed_optimizer_instances",
    "training.log_interval",
    "training.profile_step_start",
    "training.profile_step_end",
    "training.eval_interval",
    "training.eval_iters",
    "training.eval_max_new_tokens",
    "training.lr_wsd_decay_iters",
    "training.distributed_timeout_minutes",
    "training.max_skipped_updates",
    "training.exit_interval",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)
NOT_NEGATIVE = (
    "data.cost_per_token_squared",
    "data.cost_per_token",
    "data.cost_per_tile",
    "data.num_workers",
    "training.manual_gc_interval",
    "training.eval_generate_samples",
    "training.seed",
    "training.min_lr",
    "training.loss_spike_factor",
    "training.lr_warmup_iters",
    "training.weight_decay",
    "training.vision_weight_decay",
    "training.projector_weight_decay",
    "training.language_weight_decay",
    "training.clip_grad",
)
POSITIVE = (
    "training.epochs",
    "model.vision.layer_norm_eps",
    "model.language.layer_norm_eps",
    "model.language.rope_theta",
    "training.lora_alpha",
    "training.lr",
    "training.vision_lr",
    "training.projector_lr",
    "training.language_lr",
    "training.adam_eps",
    "training.exit_duration_in_mins",
)
FRACTIONS = (
    "data.valid_share",
    "training.lr_warmup_fraction",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.sgd_momentum",
)


def check_values(recipe: Recipe) -> Iterator[Problem]:
    """Check each setting against its range or its choices."""
    for setting in iter_settings(recipe):
        if setting.choices:
            yield from _check_choices(setting)
        elif isinstance(setting.value, int | float):
            yield from _check_range(setting.key, setting.value)


def _check_range(key: str, value: float) -> Iterator[Problem]:
    if not math.isfinite(value):
        yield Problem(key, value, "not a finite number", "Use a number")
    elif key in AT_LEAST_ONE and value < 1:
        yield Problem(key, value, "too small", "Use 1 or more")
    elif key in NOT_NEGATIVE and value < 0:
        yield Problem(key, value, "negative", "Use 0 or more")
    elif key in POSITIVE and value <= 0:
        yield Problem(key, value, "not positive", "Use a number above 0")
    elif key in FRACTIONS and not 0 <= value < 1:
        yield Problem(key, value, "out of range", "Use a number from 0 up to, but not including, 1")


def _check_choices(setting: Setting) -> Iterator[Problem]:
    choices = ", ".join(setting.choices)
    if setting.value == []:
        yield Problem(setting.key, [], "empty", f"Give at least one of {choices}")
    try:  # reading a recipe checks this too, but a recipe may be made in Python
        to_type(setting.value, setting.hint)
    except ValueError:
        yield Problem(setting.key, setting.value, "not a valid choice", f"Choose from {choices}")
