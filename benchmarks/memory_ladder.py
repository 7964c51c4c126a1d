"""Memory and time of each choice of recomputation, and what `recompute_granularity: auto` chooses on smaller GPUs.

    python -m benchmarks.memory_ladder                     # Instella-VL-1B on rows of 32,768 tokens, bf16
    python -m benchmarks.memory_ladder --config RECIPE.yaml --measure

The planner's estimate is printed everywhere. On a GPU each choice also trains, and its peak memory is compared with the
estimate for the same rows. Then torch is limited to the memory of smaller GPUs, one after the other, and trains with
what `auto` chooses there, which is estimated for rows full of images. A GPU with more memory than this one is only
estimated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.real_size import (
    CONFIG,
    Measured,
    Workload,
    build_workload,
    check_none_failed,
    check_same_loss,
    measure,
    packed_loop,
)
from benchmarks.support import transformers_loop
from benchmarks.support.report import RESULTS, machine, save, table
from megatron_vlm.config import ParallelConfig, Recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.rows.batch import IGNORE_INDEX
from megatron_vlm.planner.devices import GB
from megatron_vlm.planner.memory import rank_memory
from megatron_vlm.planner.recompute import Rung, cheapest_rung, describe_recompute, recompute_ladder
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.runtime.device import current_device, device_memory, on_gpu
from megatron_vlm.runtime.launch import distributed

BUDGETS = (40, 64, 80, 141, 192)
"""GB of the GPUs to choose for: A100, MI210, H100, H200, MI300X."""


@dataclass
class Line:
    """One choice of recomputation, and how it trained."""

    rung: Rung
    predicted: int
    """Bytes for the rows that are measured."""
    measured: Measured | None
    """None: it was not trained with."""

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to the measured peak."""
        if self.measured is None or not self.measured.peak_bytes:
            return None
        return self.predicted / self.measured.peak_bytes - 1


@dataclass
class Choice:
    """What `auto` takes on a GPU with `memory` bytes."""

    memory: int
    rung: Rung
    fits: bool
    """By the estimate for rows full of images."""
    measured: Measured | None


def shape_of(work: Workload) -> RowShape:
    """Of the row that takes most memory: the rows are equally long, and the one with most tiles counts."""
    row = max(range(len(work.rows)), key=lambda number: work.rows[number].num_tiles)
    lengths = [len(sample) for sample in work.samples[row]]
    batch = work.rows[row]
    return RowShape(
        tokens=len(batch.labels),
        tiles=batch.num_tiles,
        document_tokens=sum(length**2 for length in lengths) / sum(lengths),
        supervised_tokens=int((batch.labels != IGNORE_INDEX).sum()),
    )


@contextmanager
def limited_to(memory: float) -> Iterator[None]:
    """Let torch allocate no more than `memory` bytes on this GPU, which has at least as many."""
    total = torch.cuda.get_device_properties(current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(memory / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Trials:
    """Steps on the same rows from the same weights, with any choice of recomputation."""

    def __init__(self, recipe: Recipe, work: Workload, rounds: int) -> None:
        self.work, self.rounds = work, rounds
        with torch.device(current_device()):
            self.model: Any = transformers_loop.build(recipe)
        self.results: list[Measured] = []

    def run(self, rung: Rung) -> Measured:
        """Time and peak memory; `failed` if it does not fit."""
        build = partial(packed_loop, rung.recipe, self.work, self.model)
        result = measure(describe_recompute(rung.recipe), build, self.rounds)
        print(f"recomputing {result.name}: {result.failed or result.seconds}", flush=True)
        self.results.append(result)
        return result


def spread(ladder: list[Rung], count: int | None) -> list[Rung]:
    """`count` rungs at equal distances, the first and the last among them; all if there are no more or it is None."""
    if count is None or count >= len(ladder):
        return ladder
    return [ladder[round(number * (len(ladder) - 1) / (count - 1))] for number in range(count)]


def run_rungs(ladder: list[Rung], shape: RowShape, trials: Trials | None) -> list[Line]:
    """Each choice of the ladder, cheapest first."""
    return [
        Line(rung, rank_memory(rung.recipe, 1, 0, shape).total, trials.run(rung) if trials else None) for rung in ladder
    ]


def run_budgets(ladder: list[Rung], budgets: list[int], trials: Trials | None) -> list[Choice]:
    """What `auto` chooses for each budget, trained with where this GPU can be limited to it."""
    choices, here = [], device_memory()
    for memory in (size * GB for size in budgets):
        rung, fits = cheapest_rung(ladder, memory)
        measured = None
        if trials and here is not None and memory <= here:
            with limited_to(memory):
                measured = trials.run(rung)
        choices.append(Choice(memory, rung, fits, measured))
    return choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe that gives the model and the row length")
    parser.add_argument("--rows", type=int, default=2, help="rows; each is one optimizer step")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds over all rows; medians are reported")
    parser.add_argument("--rungs", type=int, help="choices to report and train with, at equal distances; default: all")
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS), help="GB to choose for")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=on_gpu(), help="train, too; default: on a GPU"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.rungs is not None and arguments.rungs < 2:
        parser.error("--rungs must be at least 2, the first and the last")
    recipe = load_recipe(arguments.config)
    recipe.parallel = ParallelConfig()
    recipe.training = replace(recipe.training, global_batch_size=1, recompute_granularity="auto")
    torch.manual_seed(0)
    work = build_workload(recipe, arguments.rows)
    ladder, shape = recompute_ladder(recipe, 1), shape_of(work)
    with distributed(recipe.parallel):
        trials = Trials(recipe, work, arguments.rounds) if arguments.measure else None
        lines = run_rungs(spread(ladder, arguments.rungs), shape, trials)
        choices = run_budgets(ladder, arguments.budgets, trials)
    if trials:
        check_same_loss(trials.results, recipe)
    report(arguments, recipe, shape, lines, choices)
    if trials:
        check_none_failed(trials.results)


def report(
    arguments: argparse.Namespace, recipe: Recipe, shape: RowShape, lines: list[Line], choices: list[Choice]
) -> None:
    """Print both tables and write the JSON."""
    about, reference = machine(), lines[0]
    print(
        f"\n{about['device']}, torch {about['torch']}; {'bf16' if recipe.training.bf16 else 'fp32'}; rows of "
        f"{shape.tokens} tokens and up to {shape.tiles} tiles, one per step; `work` is the planner's\n"
    )
    cells = [
        [describe_recompute(line.rung.recipe), _more(line.rung.work, reference.rung.work), _gib(line.predicted)]
        + _measured(line.measured, reference.measured)
        + ["-" if line.error is None else f"{100 * line.error:+.1f} %"]
        for line in lines
    ]
    measured = ["measured GiB", "s per row", "time"]
    print(table(["recomputed", "work", "predicted GiB", *measured, "planner's error"], cells))
    print("\nrecompute_granularity: auto, estimated for rows full of images:\n")
    cells = [
        [f"{choice.memory // GB} GB", describe_recompute(choice.rung.recipe)]
        + [_more(choice.rung.work, reference.rung.work), _gib(choice.rung.memory)]
        + _measured(choice.measured, reference.measured)
        + [_verdict(choice)]
        for choice in choices
    ]
    print(table(["GPU", "recomputed", "work", "predicted GiB", *measured, "fits"], cells))
    path = save(
        arguments.output,
        f"memory_ladder-{about['device'].lower().replace(' ', '-')}",
        {
            "shape": vars(shape),
            "bf16": recipe.training.bf16,
            "rungs": [
                {"recomputed": describe_recompute(line.rung.recipe), "work": line.rung.work / reference.rung.work,
                 "predicted_bytes": line.predicted, "measured": line.measured and vars(line.measured)}
                for line in lines
            ],
            "budgets": [
                {"memory_bytes": choice.memory, "recomputed": describe_recompute(choice.rung.recipe),
                 "predicted_bytes": choice.rung.memory, "fits": _verdict(choice),
                 "measured": choice.measured and vars(choice.measured)}
                for choice in choices
            ],
        },
    )  # fmt: skip
    print(f"written to {path}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _more(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f} %"


def _measured(result: Measured | None, reference: Measured | None) -> list[str]:
    """Cells: GiB, seconds per row, and time relative to that without recomputation, where it was measured."""
    if result is None:
        return ["-", "-", "-"]
    if result.failed:
        return [result.failed, "-", "-"]
    seconds = sum(result.seconds)
    known = reference is not None and not reference.failed
    return [
        _gib(result.peak_bytes) if result.peak_bytes else "-",
        f"{seconds / len(result.seconds):.3f}",
        _more(seconds, sum(reference.seconds)) if known and reference else "-",
    ]


def _verdict(choice: Choice) -> str:
    """Whether it fits, and how that is known."""
    if choice.measured:
        return "no" if choice.measured.failed else "yes"
    return "predicted" if choice.fits else "predicted not to"


if __name__ == "__main__":
    main()
