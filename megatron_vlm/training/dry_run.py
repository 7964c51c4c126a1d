"""`--dry-run`: what a recipe would do."""

from __future__ import annotations

from dataclasses import replace

from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import uses_lora
from megatron_vlm.data.planned_data import PlannedData, plan_data
from megatron_vlm.data.validation import choose_rows, open_validation
from megatron_vlm.planner.report import describe_plan
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.training.run_length import resolve_epochs, rows_of_iterations


def describe_run(recipe: Recipe, world_size: int) -> str:
    """Parallel layout, rows and samples per step, and steps per epoch, as text. Rejected samples go to the log.

    Opens the data and plans the first epoch, but builds no model. A row holds many samples: `global_batch_size` counts
    rows, where published recipes count samples.
    """
    parallel, training = recipe.parallel, recipe.training
    planned = plan_data(recipe, is_logging_rank=True)
    summary, plan = planned.dataset.counts, planned.plan
    validation = open_validation(recipe, planned, is_logging_rank=True)
    resolve_epochs(recipe, plan.rows)
    rows, samples = plan.rows, len(plan.current.members)
    per_step = samples / rows * training.global_batch_size
    steps = rows / training.global_batch_size
    epochs = rows_of_iterations(training, training.train_iters) / rows
    ramp = training.rampup_batch_size
    rampup = f", growing from {ramp[0]} by {ramp[1]} over the first {ramp[2]} rows" if ramp else ""
    return "\n".join(
        [
            f"world      {world_size} ranks = data {parallel.data_parallel_size(world_size)} x tensor "
            f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x context "
            f"{parallel.context_parallel_size}",
            f"data       {summary['samples']} samples, {summary['usable']} usable, "
            f"rejected {summary['rejected'] or 0}, too long {summary['skipped']}",
            f"rows       {rows} per epoch of {recipe.data.seq_length} tokens, "
            f"packing efficiency {100 * plan.packing_efficiency:.1f} %, {samples / rows:.1f} samples per row",
            f"step       {training.global_batch_size} rows = {per_step:.0f} samples{rampup}",
            f"run        {training.train_iters} steps = {epochs:.2f} epochs of {steps:.0f} steps",
            *(_describe_validation(recipe, validation) if validation is not None else []),
            *_describe_lora(recipe),
            f"trainable  {', '.join(training.trainable)}; {training.optimizer}, lr {training.lr:g} "
            f"{training.lr_decay_style} to {training.min_lr:g}, warmup {training.warmup_iters} steps",
            *describe_plan(recipe, world_size, _row_shape(recipe, planned)),
        ]
    )


def _describe_lora(recipe: Recipe) -> list[str]:
    training = recipe.training
    if not uses_lora(training):
        return []
    return [f"lora       r {training.lora_r}, alpha {training.lora_alpha:g}, {', '.join(training.lora_target_modules)}"]


def _row_shape(recipe: Recipe, planned: PlannedData) -> RowShape:
    """What the rows of the first epoch hold on average."""
    members, dataset = planned.plan.current.members, planned.dataset
    lengths = dataset.tokens[members].astype(float)
    guess = RowShape.of_recipe(recipe)
    return replace(
        guess,
        tiles=float(dataset.tiles[members].sum()) / planned.plan.rows,
        document_tokens=float((lengths * lengths).sum() / lengths.sum()),
    )


def _describe_validation(recipe: Recipe, validation: PlannedData) -> list[str]:
    training = recipe.training
    limit = None if training.eval_iters is None else training.eval_iters * training.global_batch_size
    rows = len(choose_rows(validation.plan, limit))
    samples = int(validation.dataset.usable.sum())
    interval = training.eval_interval or training.save_interval
    return [f"validation {samples} samples, {rows} of {validation.plan.rows} rows every {interval} steps"]
