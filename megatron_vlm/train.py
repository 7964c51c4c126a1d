"""Train: `torchrun ... -m megatron_vlm.train --config RECIPE.yaml [--tensor-model-parallel-size 2 ...]`."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from megatron_vlm.config import ConfigError, check_recipe, parse_command_line
from megatron_vlm.data.errors import DataError
from megatron_vlm.runtime.launch import distributed, world_size
from megatron_vlm.runtime.logging import configure_logging
from megatron_vlm.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory
from megatron_vlm.runtime.process_groups import parallel_ranks
from megatron_vlm.training.checkpoint import CheckpointError
from megatron_vlm.training.dry_run import describe_run
from megatron_vlm.training.trainer import train


def main(arguments: list[str]) -> int:
    """Exit status: 0 trained, 1 something failed, 2 the recipe is wrong."""
    is_logging_rank = os.environ.get("RANK", "0") == "0"
    if not is_logging_rank:  # one rank warns of old names in the recipe
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_vlm\.config")
    try:
        recipe, options = parse_command_line(arguments)
        check_recipe(recipe, world_size(), paths=True)
    except ConfigError as error:
        if is_logging_rank:
            print(error, file=sys.stderr, flush=True)
        return 2
    if options.dry_run:
        if is_logging_rank:
            configure_logging("dry run")
            print(describe_run(recipe, world_size()))
        return 0
    training = recipe.training
    with distributed(recipe.parallel, seed=training.seed, timeout_minutes=training.distributed_timeout_minutes):
        configure_logging(str(parallel_ranks()))
        train(recipe)
    return 0


def _fail(error: Exception) -> None:
    """Say what is wrong and leave at once: the other ranks' next collective fails, and torchrun ends them."""
    rank = os.environ.get("RANK", "0")
    if is_out_of_memory(error):
        message = describe_out_of_memory(error)
    else:
        message = f"{type(error).__name__}: {error}"
        if not isinstance(error, DataError | CheckpointError):
            traceback.print_exc()
    print(f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception as error:
        _fail(error)
