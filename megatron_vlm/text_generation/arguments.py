"""The engine's flags, under the names of its settings."""

from __future__ import annotations

import argparse
import os
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

from megatron_vlm.config import ConfigError, InferenceConfig, ParallelConfig


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag per setting of InferenceConfig, and the parallel layout."""
    group = parser.add_argument_group("engine")
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        text = f"{size.partition('_')[0]}-parallel ranks; start the command with torchrun [1]"
        group.add_argument(_flag(size), type=int, default=1, metavar="N", help=text)
    types = get_type_hints(InferenceConfig)
    for setting in fields(InferenceConfig):
        assert setting.default is not MISSING
        kind = type(setting.default)
        text = f"{setting.metadata['help']} [{str(setting.default).lower()}]"
        if kind is bool:
            group.add_argument(
                _flag(setting.name), action=argparse.BooleanOptionalAction, default=setting.default, help=text
            )
        else:
            choices = get_args(types[setting.name]) or None
            metavar = None if choices else "N" if kind is int else "X"
            group.add_argument(
                _flag(setting.name), type=kind, choices=choices, default=setting.default, metavar=metavar, help=text
            )


def engine_settings(options: argparse.Namespace) -> tuple[InferenceConfig, ParallelConfig]:
    """The settings that `add_engine_arguments` parsed, not checked yet."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    return InferenceConfig(
        **{setting.name: getattr(options, setting.name) for setting in fields(InferenceConfig)}
    ), parallel


def check_world_size(parallel: ParallelConfig) -> None:
    """Raise ConfigError unless the processes hold one copy of the model."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size != copy:
        raise ConfigError(
            f"world size = {world_size}, but tensor x pipeline parallel size = {copy}: this command has one copy of "
            "the model. Start it with torchrun and as many processes, or change the sizes."
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
