"""Checks of batch size, world size and optimizer against the parallel sizes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem, divides, divisors, multiples_around
from megatron_vlm.config.recipe import Recipe


def check_batch(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """Check row length, global batch size and world size against the parallel sizes."""
    parallel, seq_length = recipe.parallel, recipe.data.seq_length
    split = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if not divides(split, seq_length):
        yield Problem(
            "data.seq_length",
            seq_length,
            f"not divisible by tensor_model_parallel_size * context_parallel_size = {split}",
            f"Use {multiples_around(seq_length, split)}",
        )
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks > 1 and stages == 1:
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            chunks,
            "the interleaved schedule needs more than one stage, but pipeline_model_parallel_size = 1",
            "Use pipeline_model_parallel_size of 2 or more, or virtual_pipeline_model_parallel_size = 1",
        )
    yield from _check_world(recipe, world_size)


def _check_world(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    parallel, rows = recipe.parallel, recipe.training.global_batch_size
    needed = parallel.model_parallel_size
    if needed < 1:  # reported by check_values
        return
    if world_size % needed:
        yield Problem(
            "world size",
            world_size,
            f"not a multiple of tensor * pipeline * context parallel sizes = {parallel.tensor_model_parallel_size} * "
            f"{parallel.pipeline_model_parallel_size} * {parallel.context_parallel_size} = {needed}",
            f"Start {multiples_around(world_size, needed)} processes (torchrun --nproc-per-node), or lower a size",
        )
        return  # the data-parallel size is not known
    copies = parallel.data_parallel_size(world_size)
    if not divides(copies, rows):
        yield Problem(
            "training.global_batch_size",
            rows,
            f"not divisible by the {copies} data-parallel ranks of {world_size} processes",
            f"Use {multiples_around(rows, copies)} rows, or {divisors(rows, copies)} data-parallel ranks",
        )
        return
    instances, ranks = parallel.num_distributed_optimizer_instances, copies * parallel.context_parallel_size
    if not divides(instances, ranks):
        yield Problem(
            "parallel.num_distributed_optimizer_instances",
            instances,
            f"does not divide the {ranks} data x context ranks that share the optimizer state",
            f"Use {divisors(ranks, instances)}",
        )
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks > 1 and not divides(stages, rows // copies):
        yield Problem(
            "training.global_batch_size",
            rows,
            f"gives {rows // copies} micro-batches to each of {copies} data-parallel ranks, and the interleaved "
            f"schedule requires a multiple of pipeline_model_parallel_size = {stages}",
            f"Use {multiples_around(rows, stages * copies)} rows, or virtual_pipeline_model_parallel_size = 1",
        )


def check_optimization(recipe: Recipe) -> Iterator[Problem]:
    """Check optimizer settings against parallel settings, and learning rates against each other."""
    training, parallel = recipe.training, recipe.parallel
    if training.optimizer == "sgd" and parallel.use_distributed_optimizer:
        # megatron-core would assert this later, when it builds the optimizer.
        yield Problem(
            "training.optimizer",
            training.optimizer,
            "megatron-core's distributed optimizer supports only adam",
            "Use optimizer = adam, or use_distributed_optimizer = false",
        )
    if parallel.num_distributed_optimizer_instances > 1 and not parallel.use_distributed_optimizer:
        yield Problem(
            "parallel.num_distributed_optimizer_instances",
            parallel.num_distributed_optimizer_instances,
            "requires parallel.use_distributed_optimizer, which is false",
            "Set use_distributed_optimizer = true, or num_distributed_optimizer_instances = 1",
        )
    if parallel.overlap_param_gather:
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, name):
                yield Problem(
                    "parallel.overlap_param_gather",
                    True,
                    f"requires parallel.{name}, which is false",
                    f"Set {name} = true, or overlap_param_gather = false",
                )
    for name in ("lr", "vision_lr", "projector_lr", "language_lr"):
        rate = getattr(training, name)
        if rate is not None and rate > 0 and training.min_lr > rate:
            yield Problem(
                "training.min_lr",
                training.min_lr,
                f"above the peak training.{name} = {rate}: the learning rate would rise instead of decay",
                f"Use a min_lr of at most {rate}",
            )


def check_recompute(recipe: Recipe) -> Iterator[Problem]:
    """Check the settings of recomputation against each other."""
    training = recipe.training
    for name, granularity in (("recompute_modules", "selective"), ("recompute_num_layers", "full")):
        value = getattr(training, name)
        if value is not None and training.recompute_granularity != granularity:
            yield Problem(
                f"training.{name}",
                value,
                f"belongs to recompute_granularity = {granularity}, which is {training.recompute_granularity or 'off'}",
                f"Set recompute_granularity = {granularity}, or leave {name} out",
            )
    if training.recompute_granularity == "auto" and training.recompute_vision is not None:
        yield Problem(
            "training.recompute_vision",
            training.recompute_vision,
            "is chosen by recompute_granularity = auto",
            "Leave recompute_vision out, or choose recompute_granularity yourself",
        )
