"""`--dry-run`: what a recipe would do."""

from __future__ import annotations

from megatron_vlm.config import Recipe
from megatron_vlm.data.dataset import open_dataset, open_plan_cache
from megatron_vlm.data.packing.row_plan import RowPlan
from megatron_vlm.data.plan_fingerprint import plan_inputs


def describe_run(recipe: Recipe, world_size: int) -> str:
    """Parallel layout, rows and samples per step, and steps per epoch, as text. Rejected samples go to the log.

    Opens the data and plans the first epoch, but builds no model. A row holds many samples: `global_batch_size` counts
    rows, where published recipes count samples.
    """
    parallel, training = recipe.parallel, recipe.training
    opened = open_dataset(recipe, is_logging_rank=True)
    summary, plan = opened.counts, RowPlan(open_plan_cache(recipe, opened, plan_inputs(recipe, opened)))
    rows, samples = plan.rows, len(plan.current.members)
    per_step = samples / rows * training.global_batch_size
    steps = rows / training.global_batch_size
    return "\n".join(
        [
            f"world      {world_size} ranks = data {parallel.data_parallel_size(world_size)} x tensor "
            f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x context "
            f"{parallel.context_parallel_size}",
            f"data       {summary['samples']} samples, {summary['usable']} usable, "
            f"rejected {summary['rejected'] or 0}, too long {summary['skipped']}",
            f"rows       {rows} per epoch of {recipe.data.seq_length} tokens, "
            f"packing efficiency {100 * plan.packing_efficiency:.1f} %, {samples / rows:.1f} samples per row",
            f"step       {training.global_batch_size} rows = {per_step:.0f} samples",
            f"run        {training.train_iters} steps = {training.train_iters / steps:.2f} epochs of {steps:.0f} steps",
            f"trainable  {', '.join(training.trainable)}; {training.optimizer}, lr {training.lr:g} "
            f"{training.lr_decay_style} to {training.min_lr:g}",
        ]
    )
