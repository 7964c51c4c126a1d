"""How many rows each iteration takes, and how many iterations a number of epochs is."""

from __future__ import annotations

import math

from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.config.checks.schedule import check_schedule
from megatron_vlm.config.training import TrainingConfig
from megatron_vlm.training.checkpoint.progress import Progress


def batch_size(training: TrainingConfig, consumed_rows: int) -> int:
    """Rows of the iteration that starts after `consumed_rows` rows, over all data-parallel ranks.

    With `rampup_batch_size` the size grows by Megatron-LM's formula: in equal parts of the ramp's rows, from the start
    size in whole increments.
    """
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, ramp_rows = training.rampup_batch_size
    if consumed_rows > ramp_rows:
        return training.global_batch_size
    rows_per_increment = ramp_rows / ((training.global_batch_size - start) // increment)
    return start + int(consumed_rows / rows_per_increment) * increment


def iterations_for_rows(training: TrainingConfig, rows: int, consumed: int = 0) -> int:
    """The smallest number of iterations that consume the rows from index `consumed` up to at least `rows`."""
    iterations = 0
    ramp_rows = training.rampup_batch_size[2] if training.rampup_batch_size else -1
    while consumed < rows and consumed <= ramp_rows:
        consumed += batch_size(training, consumed)
        iterations += 1
    return iterations + math.ceil(max(rows - consumed, 0) / training.global_batch_size)


def rows_of_iterations(training: TrainingConfig, iterations: int) -> int:
    """Rows that the first `iterations` iterations consume."""
    consumed = 0
    ramp_rows = training.rampup_batch_size[2] if training.rampup_batch_size else -1
    while iterations and consumed <= ramp_rows:
        consumed += batch_size(training, consumed)
        iterations -= 1
    return consumed + iterations * training.global_batch_size


def resolve_epochs(recipe: Recipe, rows_per_epoch: int, progress: Progress | None = None) -> None:
    """Set train_iters from `epochs`, where that is given.

    Every row of the epochs is trained on; the last iteration may take a few of the next epoch.

    Args:
        recipe: changed in-place.
        rows_per_epoch: of the first epoch. Later ones differ by few rows, if at all.
        progress: of a run that is resumed, perhaps with another batch size.

    Raises:
        ConfigError: the schedule does not fit the number of iterations.
    """
    training = recipe.training
    if training.epochs is None:
        return
    progress = progress or Progress()
    rows = math.ceil(training.epochs * rows_per_epoch)
    training.train_iters = progress.iteration + iterations_for_rows(training, rows, progress.consumed_rows)
    problems = [str(problem) for problem in check_schedule(recipe)]
    if problems:
        raise ConfigError(problems)
