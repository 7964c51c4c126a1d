"""A training step at the real size on one GPU: time, share of the device's peak, memory; and a plain transformers loop.

    python -m benchmarks.real_size                  # Instella-VL-1B on rows of 32,768 tokens, bf16, all parts trained
    python -m benchmarks.real_size --config RECIPE.yaml --rows 2 --micro-batches 1

Every row is one optimizer step of the samples that a row of the instruction mix holds; transformers takes the same
samples a few at a time, padded. What a step computes is counted in the model's operations
(`megatron_vlm.data.packing.row_cost`, and the loss head), without padding and without recomputation, and is compared
with a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from benchmarks import transformers_loop
from benchmarks.instruct_samples import InstructRows
from benchmarks.report import RESULTS, machine, save, table
from benchmarks.samples import Sample
from benchmarks.train_step import PackedLoop, seconds
from megatron_vlm.config import ParallelConfig, Recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.data.packing.row_cost import cost_of_model
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.runtime.out_of_memory import ran_out_of_memory

CONFIG = Path(__file__).parent.parent / "examples/instellavl/instruct.yaml"
SAME_LOSS = {True: 2e-2, False: 1e-4}
"""Relative difference allowed between the losses of the peers on the same samples, by bf16."""
MATRIX = {True: 8192, False: 512}
"""Side of the matrices whose product is the limit, by whether there is a GPU."""
OUT_OF_MEMORY = "out of memory"


@dataclass
class Measured:
    """One loop over all rows, or why there is nothing to say of it."""

    name: str
    seconds: list[float]
    """Of each row, the median over rounds."""
    peak_bytes: int
    loss: float
    """Of the first row, before anything is trained."""
    failed: str = ""


@dataclass
class Work:
    """The samples of each row, and what they are."""

    samples: list[list[Sample]]
    rows: list[PackedBatch]
    operations: list[float]
    """Of each row's training step."""


def operations_of(recipe: Recipe, samples: list[Sample]) -> float:
    """Floating-point operations of a training step on these samples: forward, and twice that backward."""
    tokens, tiles = (torch.tensor([f(s) for s in samples]).numpy() for f in (len, lambda s: len(s.tiles)))
    language = recipe.model.language
    labelled = sum(int((s.document.encoded.labels[1:] != IGNORE_INDEX).sum()) for s in samples)
    head = 6.0 * language.hidden_size * language.vocab_size * labelled
    return float(cost_of_model(recipe.model).of(tokens, tiles).sum()) + head


def draw_work(recipe: Recipe, rows: int) -> Work:
    source = InstructRows(recipe.model, recipe.data.seq_length, recipe.data.max_tiles_per_row)
    samples = [source.samples(row) for row in range(rows)]
    return Work(samples, [source.pack(row) for row in samples], [operations_of(recipe, row) for row in samples])


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on random numbers."""
    side = MATRIX[on_gpu()]
    a, b = (torch.randn(side, side, device=current_device()).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(30)]
    return 2.0 * side**3 / statistics.median(times[10:])


def measure(name: str, build: Callable[[], tuple[Any, list[Any]]], rounds: int) -> Measured:
    """Build a loop and its work, run every row once to warm up, then `rounds` times; all memory is given back."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    try:
        loop, steps = build()
        losses = [loop.step(step) for step in steps]
        times = [[seconds(lambda step=step: loop.step(step)) for step in steps] for _ in range(rounds)]
        medians = [statistics.median(row) for row in zip(*times, strict=True)]
        result = Measured(name, medians, torch.cuda.max_memory_allocated() if on_gpu() else 0, losses[0])
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        result = Measured(name, [], 0, float("nan"), OUT_OF_MEMORY)
    loop = steps = None
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
    return result


def loops(recipe: Recipe, work: Work, model: Any, micro_batches: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every loop that is measured: its name, and what builds it and its steps."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    def ours(recompute: str | None) -> tuple[Any, list[Any]]:
        training = replace(recipe.training, global_batch_size=1, recompute_granularity=recompute)
        model.to("cpu")  # its memory is not ours
        return PackedLoop(model, replace(recipe, training=training)), [[row] for row in work.rows]

    def theirs(recompute: str | None, size: int) -> tuple[Any, list[Any]]:
        model.load_state_dict(state)
        model.gradient_checkpointing_disable()
        model.to(current_device())
        training = replace(recipe.training, recompute_granularity=recompute)
        steps = [transformers_loop.micro_batches(row, size, current_device()) for row in work.samples]
        return transformers_loop.Loop(model, replace(recipe, training=training)), steps

    for recompute, said in ((None, ""), ("full", ", recomputing")):
        yield f"megatron-vlm, packed{said}", lambda recompute=recompute: ours(recompute)
    for size in micro_batches:
        for recompute, said in ((None, ""), ("full", ", recomputing")):
            yield f"transformers, {size} at a time{said}", lambda r=recompute, s=size: theirs(r, s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe: its model and rows are used")
    parser.add_argument("--rows", type=int, default=4, help="rows, each a step")
    parser.add_argument("--rounds", type=int, default=3, help="times all rows are timed; medians are reported")
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 4], help="samples transformers takes")
    parser.add_argument("--profile", type=Path, help="write the kernels of one of our steps, by time, to this file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config)
    recipe.parallel = ParallelConfig()
    with distributed(recipe.parallel):
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    work = draw_work(recipe, arguments.rows)
    limit = matrix_rate(torch.bfloat16 if recipe.training.bf16 else torch.float32)
    with torch.device(current_device()):
        model = transformers_loop.build(recipe)
    results = []
    for name, build in loops(recipe, work, model, arguments.micro_batches):
        results.append(measure(name, build, arguments.rounds))
        print(f"{name}: {results[-1].failed or results[-1].seconds}", flush=True)
        if arguments.profile and len(results) == 1:
            write_profile(arguments.profile, build)
    check_same_work(results, recipe)
    report(arguments, recipe, work, results, limit)


def check_same_work(results: list[Measured], recipe: Recipe) -> None:
    """All loops must have had the same loss before anything was trained."""
    losses = {result.name: result.loss for result in results if not result.failed}
    reference = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - reference) <= SAME_LOSS[recipe.training.bf16] * reference:
            raise SystemExit(f"the peers do not do the same work: {name} has loss {loss:.6f}, ours is {reference:.6f}")


def write_profile(path: Path, build: Callable[[], tuple[Any, list[Any]]]) -> None:
    """Where the time of one step goes, kernel by kernel."""
    loop, steps = build()
    loop.step(steps[0])
    with torch.profiler.profile() as profile:
        seconds(lambda: loop.step(steps[0]))
    order = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90))


def report(arguments: argparse.Namespace, recipe: Recipe, work: Work, results: list[Measured], limit: float) -> None:
    """Print the table and write the JSON."""
    samples, tiles = sum(map(len, work.samples)), sum(row.num_tiles for row in work.rows)
    tokens, operations = sum(row.num_tokens for row in work.rows), sum(work.operations)
    about = machine()
    print(
        f"\n{about['device']}, torch {about['torch']}, megatron-core {about['megatron-core']}, transformers "
        f"{about['transformers']}; {'bf16' if recipe.training.bf16 else 'fp32'}; a matrix product reaches "
        f"{limit / 1e12:.3g} TFLOP/s\n{len(work.rows)} rows of {recipe.data.seq_length}, each a step: {samples} "
        f"samples, {tokens:,} tokens, {tiles} tiles; median of {arguments.rounds} rounds\n"
    )
    done = [result for result in results if not result.failed]
    ours = sum(done[0].seconds)
    lines = []
    for result in results:
        if result.failed:
            lines.append([result.name, result.failed, "", "", "", ""])
            continue
        spent = sum(result.seconds)
        lines.append(
            [result.name, f"{spent / len(work.rows):.3f}", f"{tokens / spent:,.0f}",
             f"{100 * operations / spent / limit:.1f} %", f"{result.peak_bytes / 2**30:.1f}", f"{spent / ours:.2f}x"]
        )  # fmt: skip
    header = ["training loop", "s per row", "tokens/s", "of the limit", "peak GiB", f"{done[0].name} is faster by"]
    print(table(header, lines))
    path = save(
        arguments.output,
        f"real_size-{about['device'].lower().replace(' ', '-')}",
        {
            "settings": {name: getattr(arguments, name) for name in ("rows", "rounds", "micro_batches")},
            "seq_length": recipe.data.seq_length,
            "bf16": recipe.training.bf16,
            "samples": samples,
            "tokens": tokens,
            "tiles": tiles,
            "operations": operations,
            "matrix_product_per_second": limit,
            "loops": [asdict(result) for result in results],
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
