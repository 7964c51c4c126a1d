"""`megatron-vlm train --config RECIPE.yaml [--SETTING VALUE ...]`, or `torchrun ... -m megatron_vlm.train ...`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from megatron_vlm.config import ConfigError, Recipe, check_recipe, parse_command_line
from megatron_vlm.data.errors import DataError
from megatron_vlm.runtime import exit_codes
from megatron_vlm.runtime.s3 import is_remote

_LONGEST_CONVERSION_MINUTES = 60
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""Beginnings of the environment variables by which a process knows that it is a rank of torchrun's."""


def main(arguments: list[str] | None = None, prog: str = "python -m megatron_vlm.train") -> int:
    """Returns an exit code of `runtime/exit_codes.py`. After an error the process exits without returning.

    `arguments` are those of the process by default; `prog` is the program's name in the help text.
    """
    is_logging_rank = os.environ.get("RANK", "0") == "0"
    if not is_logging_rank:  # one rank warns of old names in the recipe
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_vlm\.config")
    try:
        recipe, options = parse_command_line(arguments, prog)
        _complete(recipe, options.given)
        _check(recipe, describe=options.dry_run and is_logging_rank)
    except ConfigError as error:
        if is_logging_rank:
            print(error, file=sys.stderr, flush=True)
        return exit_codes.WRONG_SETTINGS
    try:
        if not options.dry_run:
            _convert_pretrained(recipe, take_tokenizer="data.tokenizer_model" not in options.given)
            return exit_codes.FINISHED if _train(recipe) else exit_codes.SAVED
        if is_logging_rank:
            _dry_run(recipe)
    except Exception as error:
        _fail(error)
    return exit_codes.FINISHED


def _check(recipe: Recipe, *, describe: bool) -> None:
    """Raise ConfigError with all problems. With `describe`, first print what can be said of a recipe without data."""
    try:
        check_recipe(recipe, _world_size(), paths=True)
    except ConfigError:
        if describe:
            from megatron_vlm.planner.report import describe_plan

            with suppress(ConfigError):
                check_recipe(recipe, _world_size())
                print("\n".join(describe_plan(recipe, _world_size())), flush=True)
        raise


def _world_size() -> int:
    """Number of processes in the job; known before torch.distributed is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# torch and megatron-core are imported by the functions below only: --help and wrong settings are answered at once.


def _complete(recipe: Recipe, given: set[str]) -> None:
    """Take what the user did not set from the model that training starts from."""
    from checkpoint_convert.model_config import complete_recipe

    complete_recipe(recipe, given)


def _convert_pretrained(recipe: Recipe, take_tokenizer: bool) -> None:
    """Where `pretrained_checkpoint` is a Hugging Face folder, start from its conversion in SAVE/pretrained instead.

    Rank 0 converts, once for all runs with this --save; the other ranks wait for the folder, which appears complete.
    Training itself knows Megatron checkpoints only.
    """
    training = recipe.training
    source, target = training.pretrained_checkpoint, _conversion_target(recipe)
    if source is None or target is None:
        return
    training.pretrained_checkpoint = str(target)
    if take_tokenizer:
        recipe.data.tokenizer_model = str(target / "tokenizer")
    deadline = time.monotonic() + 60 * _LONGEST_CONVERSION_MINUTES
    while not target.is_dir():
        if os.environ.get("RANK", "0") == "0":
            _convert(source, target)
        elif time.monotonic() > deadline:
            raise DataError(f"{target} did not appear: rank 0 converts into it. Do all ranks see that folder?")
        else:
            time.sleep(0.5)


def _conversion_target(recipe: Recipe) -> Path | None:
    """The folder that `pretrained_checkpoint` is converted into; None where it is no Hugging Face folder."""
    source, save = recipe.training.pretrained_checkpoint, recipe.training.save
    if source is None or not Path(source, "config.json").is_file():
        return None
    if save is None or is_remote(save):
        raise DataError(
            f"pretrained_checkpoint {source} is a Hugging Face folder, and there is no folder of --save to convert it "
            f"into. Give one on a disk, or convert it yourself: megatron-vlm import --model {source} --save DIR"
        )
    return Path(save, "pretrained")


def _convert(source: str, target: Path) -> None:
    """In a process of its own, because conversion has a process group of one rank."""
    print(f"converting {source} into {target}", flush=True)
    command = [sys.executable, "-m", "checkpoint_convert.hf_to_megatron", "--model", source, "--save", str(target)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_RANK_VARIABLES)}
    failed = subprocess.run(command, env=environment).returncode
    if failed and not target.is_dir():  # it is there if another run with this --save was faster
        raise DataError(f"pretrained_checkpoint {source} could not be converted; the reason is printed above")


def _train(recipe: Recipe) -> bool:
    """Whether the run is finished; otherwise it was stopped, and saved."""
    from megatron_vlm.runtime.agreement import require_same_start
    from megatron_vlm.runtime.launch import initialize_model_parallel, process_group
    from megatron_vlm.runtime.logging import configure_logging
    from megatron_vlm.runtime.process_groups import parallel_ranks
    from megatron_vlm.training.recompute_choice import resolve_recompute
    from megatron_vlm.training.trainer import train

    callbacks = []
    if recipe.training.eval_generate_samples:
        from megatron_vlm.inference.training_samples import TrainingSamples

        callbacks.append(TrainingSamples(recipe))
    minutes = recipe.training.distributed_timeout_minutes
    with process_group(minutes):
        require_same_start(recipe)
        initialize_model_parallel(recipe.parallel, seed=recipe.training.seed, timeout_minutes=minutes)
        configure_logging(str(parallel_ranks()))
        resolve_recompute(recipe)
        return train(recipe, callbacks)


def _dry_run(recipe: Recipe) -> None:
    from checkpoint_convert.initial_weights import describe_start
    from megatron_vlm.runtime.logging import configure_logging
    from megatron_vlm.training.dry_run import describe_run

    configure_logging("dry run")
    _conversion_target(recipe)
    start = describe_start(recipe)
    print(f"{describe_run(recipe, _world_size())}\nstart      {start}")


def _fail(error: Exception) -> None:
    """Print what is wrong and exit at once: the other ranks' next collective fails, and torchrun ends them."""
    print(f"[rank {os.environ.get('RANK', '0')}] {_describe(error)}", file=sys.stderr, flush=True)
    os._exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    if isinstance(error, ImportError):  # perhaps of megatron-core, which the import below needs
        return exit_codes.FAILED
    from megatron_vlm.training.finite_update import NonFiniteError

    return exit_codes.WRONG_SETTINGS if isinstance(error, ConfigError | NonFiniteError) else exit_codes.FAILED


def _describe(error: Exception) -> str:
    """One message; for an error that is not the user's to correct, a traceback is printed before it."""
    if isinstance(error, ImportError) and error.name is None:
        return str(error)  # says which package to install
    from checkpoint_convert.errors import ConversionError
    from megatron_vlm.runtime.agreement import RanksDisagreeError
    from megatron_vlm.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory
    from megatron_vlm.training.checkpoint import CheckpointError
    from megatron_vlm.training.finite_update import NonFiniteError

    if is_out_of_memory(error):
        return describe_out_of_memory(error)
    known = ConfigError | DataError | CheckpointError | ConversionError | NonFiniteError | RanksDisagreeError
    if not isinstance(error, known):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
