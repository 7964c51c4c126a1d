"""Settings that are wrong on their own: sizes below one, rates out of range, names that do not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_vlm.config.errors import nearest
from megatron_vlm.config.problems import Problem
from megatron_vlm.config.recipe import Recipe, Setting, leaves

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
    "model.language.vocab_size",
    "model.language.max_position_embeddings",
    "data.seq_length",
    "data.max_tiles_per_row",
    "data.packing_window",
    "training.train_iters",
    "training.global_batch_size",
    "training.save_interval",
    "training.log_interval",
    "training.distributed_timeout_minutes",
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
    "training.seed",
    "training.min_lr",
    "training.weight_decay",
    "training.clip_grad",
)
POSITIVE = (
    "model.vision.layer_norm_eps",
    "model.language.layer_norm_eps",
    "model.language.rope_theta",
    "training.lr",
    "training.vision_lr",
    "training.projector_lr",
    "training.adam_eps",
)
FRACTIONS = ("training.lr_warmup_fraction", "training.adam_beta1", "training.adam_beta2", "training.sgd_momentum")


def check_values(recipe: Recipe) -> Iterator[Problem]:
    """Each setting against its own range and choices."""
    for leaf in leaves(recipe):
        if leaf.choices:
            yield from _check_choices(leaf)
        elif leaf.default is not None:
            yield from _check_range(leaf.key, leaf.default)


def _check_range(key: str, value: float) -> Iterator[Problem]:
    if key in AT_LEAST_ONE and value < 1:
        yield Problem(key, value, "too small", "Give 1 or more")
    elif key in NOT_NEGATIVE and value < 0:
        yield Problem(key, value, "negative", "Give 0 or more")
    elif key in POSITIVE and value <= 0:
        yield Problem(key, value, "not positive", "Give a number above 0")
    elif key in FRACTIONS and not 0 <= value < 1:
        yield Problem(key, value, "out of range", "Give a number from 0 to below 1")


def _check_choices(leaf: Setting) -> Iterator[Problem]:
    given = leaf.default if isinstance(leaf.default, list) else [leaf.default]
    for name in given:
        if name is None and not isinstance(leaf.default, list):
            continue
        # A choice such as anyres_max_N stands for anyres_max_1, anyres_max_2, ...
        if name in leaf.choices and not name.endswith("_N") or re.sub(r"_[1-9]\d*$", "_N", str(name)) in leaf.choices:
            continue
        guess = nearest(str(name), leaf.choices)
        remedy = f"Choose from {', '.join(leaf.choices)}" + (f"; the nearest is {guess}" if guess else "")
        yield Problem(leaf.key, name, "there is no such choice", remedy)
    if leaf.default == []:
        yield Problem(leaf.key, [], "empty", f"Name at least one of {', '.join(leaf.choices)}")
