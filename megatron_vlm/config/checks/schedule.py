"""Checks of the learning rate's schedule and of the batch size's ramp-up."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem, divides
from megatron_vlm.config.recipe import Recipe


def check_schedule(recipe: Recipe) -> Iterator[Problem]:
    """Check warmup and final decay against train_iters. With `epochs`, train_iters must have been derived before."""
    training = recipe.training
    total, warmup = training.train_iters, training.warmup_iters
    if total < 1:  # reported by check_values
        return
    if training.lr_warmup_iters is not None and warmup >= total:
        yield Problem(
            "training.lr_warmup_iters",
            warmup,
            f"the warmup does not end before the run, which has {total} iterations",
            f"Use at most {total - 1}",
        )
    elif training.lr_decay_style == "WSD" and warmup + training.wsd_decay_iters > total:
        yield Problem(
            "training.lr_wsd_decay_iters",
            training.wsd_decay_iters,
            f"with {warmup} iterations of warmup more than the run's {total}",
            f"Use at most {total - warmup}",
        )


def check_rampup(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """Check the three numbers of rampup_batch_size against each other, the batch size and the parallel sizes."""
    ramp, rows, parallel = recipe.training.rampup_batch_size, recipe.training.global_batch_size, recipe.parallel
    if ramp is None:
        return
    setting = "training.rampup_batch_size"
    if len(ramp) != 3 or min(ramp) < 1:
        yield Problem(setting, ramp, "not three numbers of 1 or more", "Give START INCREMENT ROWS, such as 16 8 4096")
        return
    start, increment, _ = ramp
    if start >= rows or (rows - start) % increment:
        yield Problem(
            setting,
            ramp,
            f"steps of {increment} rows do not lead from {start} up to global_batch_size = {rows}",
            "Use an increment that divides the difference",
        )
    copies = max(world_size // max(parallel.model_parallel_size, 1), 1)
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    unit = copies * (parallel.pipeline_model_parallel_size if interleaved else 1)
    if not (divides(unit, start) and divides(unit, increment)):
        needed = f"{copies} data-parallel ranks" + (" x pipeline stages (interleaved schedule)" if interleaved else "")
        yield Problem(
            setting, ramp, f"start or increment is not divisible by {needed} = {unit}", f"Use multiples of {unit}"
        )
