"""Checks of the generation engine's settings."""

from __future__ import annotations

from typing import get_args, get_type_hints

from megatron_vlm.config.checks.model import check_language, check_vision
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.inference import InferenceConfig
from megatron_vlm.config.recipe import Recipe

AT_LEAST_ONE = (
    "inference_max_requests",
    "inference_dynamic_batching_block_size",
    "max_queued_requests",
)
NOT_NEGATIVE = (
    "inference_max_seq_length",
    "inference_dynamic_batching_max_tokens",
    "inference_dynamic_batching_buffer_size_gb",
    "max_cached_images",
)


def check_inference(config: InferenceConfig, recipe: Recipe | None = None) -> None:
    """Raise ConfigError with all problems of the settings, and of `recipe`'s model in its parallel layout."""
    problems = [
        f"{name} = {getattr(config, name)}: must be at least 1." for name in AT_LEAST_ONE if getattr(config, name) < 1
    ]
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            problems.append(f"{name} = {getattr(config, name)}: must not be negative.")
    if 0 < config.inference_dynamic_batching_max_tokens < config.inference_max_requests:
        problems.append(
            f"inference_dynamic_batching_max_tokens = {config.inference_dynamic_batching_max_tokens}: must be at least "
            f"inference_max_requests = {config.inference_max_requests}, because each running request adds one token "
            "to a step."
        )
    if config.cuda_graph_impl not in get_args(get_type_hints(InferenceConfig)["cuda_graph_impl"]):
        problems.append(f"cuda_graph_impl = {config.cuda_graph_impl}: must be none or local.")
    if recipe is not None:
        problems += [str(problem) for problem in (*check_vision(recipe), *check_language(recipe))]
    if problems:
        raise ConfigError(problems)
