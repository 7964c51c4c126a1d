"""Plans as text: for `--dry-run`, and the table of `plan-layout`."""

from __future__ import annotations

from dataclasses import replace

from megatron_vlm.config import PARTS, Recipe
from megatron_vlm.config.lora import lora_parameters
from megatron_vlm.planner.balance import layers_per_stage
from megatron_vlm.planner.devices import DEVICES, GB, GPUS_PER_MACHINE
from megatron_vlm.planner.estimate import Estimate, days
from megatron_vlm.planner.memory import RankMemory, rank_memory
from megatron_vlm.planner.parameters import model_parameters
from megatron_vlm.planner.recompute import cheapest_rung, describe_recompute, recompute_ladder
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.planner.search import best_layouts

_BILLION = 10**9
_MACHINES = ("MI300X", "H100")
_MEMORY_SIZES = (40, 64, 80, 141, 192)
"""GB of the GPUs for which a dry run says what would be recomputed."""


def describe_plan(recipe: Recipe, world_size: int, shape: RowShape | None = None) -> list[str]:
    """Model, memory in the recipe's own layout, tokens, and the time on a machine of eight GPUs; one line each.

    `shape` is that of the planned rows; without it, rows are taken to be full of images.
    """
    source = "rows full of images" if shape is None else "the planned rows"
    shape = shape or RowShape.of_recipe(recipe)
    training, parallel = recipe.training, recipe.parallel
    parameters = model_parameters(recipe.model)
    adapters = lora_parameters(recipe.model.language, training)
    trained = adapters + sum(parameters[part] for part in PARTS if part in training.trainable)
    parts = ", ".join(f"{part} {count / _BILLION:.3f}" for part, count in parameters.items())
    stages = range(parallel.pipeline_model_parallel_size)
    fullest = max((rank_memory(recipe, world_size, rank, shape) for rank in stages), key=lambda memory: memory.total)
    lines = [
        f"model      {sum(parameters.values()) / _BILLION:.3f} B parameters: {parts}; {trained / _BILLION:.3f} trained"
        + (f", of which LoRA {adapters / _BILLION:.3f}" if adapters else ""),
        f"stages     {'-'.join(map(str, layers_per_stage(recipe)))} language layers",
        f"memory     {fullest.total / GB:.1f} GB on the fullest rank of {world_size}: {describe_memory(fullest)}",
    ]
    if training.recompute_granularity == "auto":
        lines += [f"recompute  {line}" for line in _recompute_choices(recipe, world_size, shape)]
    rows = f"{training.global_batch_size} rows x {recipe.data.seq_length}"
    if training.epochs is None or source == "the planned rows":
        steps = training.train_iters
        positions = steps * training.global_batch_size * recipe.data.seq_length
        lines.append(f"tokens     {steps} steps x {rows} = {positions / _BILLION:.2f} B")
    else:
        steps = None
        lines.append(f"tokens     {rows} a step; {training.epochs} epochs are as many steps as the data fills")
    return lines + [f"time       {line}, for {source}" for line in _times(recipe, shape, steps)]


def describe_memory(memory: RankMemory) -> str:
    return ", ".join(f"{name} {size / GB:.1f}" for name, size in vars(memory).items())


def _recompute_choices(recipe: Recipe, world_size: int, shape: RowShape) -> list[str]:
    """What `recompute_granularity: auto` would choose on GPUs of several sizes. Rows may be fuller than on average."""
    lines, full = [], replace(shape, tiles=RowShape.of_recipe(recipe).tiles)
    ladder = recompute_ladder(recipe, world_size, full)
    for size in _MEMORY_SIZES:
        rung, fits = cheapest_rung(ladder, size * GB)
        cost = f"{100 * (rung.work / ladder[0].work - 1):.0f} % more work, {rung.memory / GB:.0f} GB"
        lines.append(f"on {size} GB: {describe_recompute(rung.recipe)} ({cost}{'' if fits else '; does not fit'})")
    return lines


def _times(recipe: Recipe, shape: RowShape, steps: int | None) -> list[str]:
    """For all steps, or for 1,000 of them where their number is not known."""
    lines, per = [], "" if steps is not None else " per 1,000 steps"
    for name in _MACHINES:
        found = best_layouts(recipe, GPUS_PER_MACHINE, DEVICES[name], shape)
        if not found:
            lines.append(f"{GPUS_PER_MACHINE} x {name}: no layout fits, or {recipe.training.global_batch_size} rows")
            continue
        best = found[0]
        lines.append(
            f"{GPUS_PER_MACHINE} x {name}: about {_duration(days(best, steps or 1000))}{per}, "
            f"{best.step_seconds:.2f} s a step, MFU {100 * best.mfu:.0f} %, "
            f"{best.memory.total / GB:.0f} GB a rank, with {describe_layout(best)}"
        )
    return lines


def _duration(days_: float) -> str:
    return f"{days_:.1f} days" if days_ >= 1 else f"{24 * days_:.1f} hours"


def describe_layout(found: Estimate) -> str:
    parallel = found.recipe.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size, "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size, "VPP": parallel.virtual_pipeline_model_parallel_size,
    }  # fmt: skip
    names = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    names.append(f"DP {parallel.data_parallel_size(found.world_size)}")
    recompute = found.recipe.training.recompute_granularity
    return ", ".join([*names, *([f"recompute {recompute}"] if recompute else [])])


_COLUMNS = ("TP", "CP", "PP", "VPP", "DP", "recompute", "s/step", "tokens/s", "MFU", "bubble", "GB sent", "GB/rank",
            "param", "grad", "optim", "activ", "temp", "stages")  # fmt: skip


def table(found: list[Estimate]) -> str:
    """One line for each layout: sizes, recomputation, time, and memory of the fullest rank in GB."""
    rows = [_COLUMNS, *(_cells(one) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cells(one: Estimate) -> tuple[str, ...]:
    parallel, memory = one.recipe.parallel, one.memory
    sizes = (
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size, parallel.data_parallel_size(one.world_size),
    )  # fmt: skip
    return (
        *map(str, sizes),
        one.recipe.training.recompute_granularity or "-",
        f"{one.step_seconds:.2f}",
        f"{one.tokens_per_second:,.0f}",
        f"{100 * one.mfu:.1f} %",
        f"{100 * one.bubble:.0f} %",
        f"{one.traffic.total / GB:.1f}",
        f"{memory.total / GB:.1f}",
        *(f"{size / GB:.1f}" for size in vars(memory).values()),
        parallel.pipeline_model_parallel_layout or "-",
    )
