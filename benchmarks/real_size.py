"""A full-size training step on one GPU beside a plain transformers loop: time, MFU, memory.

    python -m benchmarks.real_size                  # Instella-VL-1B on rows of 32,768 tokens, bf16, all parts trained
    python -m benchmarks.real_size --config RECIPE.yaml --rows 2 --micro-batches 1

Each row holds samples of the instruction mix and is one optimizer step; transformers trains on the same samples in
padded micro-batches, and without padding where flash-attn and Liger are installed. A step's FLOPs are the model's
(`megatron_vlm.data.packing.row_cost`, plus the loss head), without padding and recomputation. They are compared with a
large matrix multiplication measured in the same run (GEMM peak) and with the peak of the device's datasheet (MFU, bf16
only).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import transformers_flash, transformers_loop
from benchmarks.support.instruct_samples import InstructRows
from benchmarks.support.kernel_kinds import seconds_by_kind
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.support.samples import Sample
from benchmarks.train_step import PackedLoop, time_call
from megatron_vlm.config import ConfigError, ParallelConfig, Recipe
from megatron_vlm.config.lora import lora_parameters
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.packing.row_cost import step_operations
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.runtime.out_of_memory import is_out_of_memory
from megatron_vlm.runtime.peak_rate import datasheet_peak, measured_gemm_rate

CONFIG = Path(__file__).parent.parent / "examples/instellavl/instruct.yaml"
LOSS_TOLERANCE = {True: 2e-2, False: 1e-4}
"""Relative difference allowed between the loops' losses on the same samples, by bf16."""
OUT_OF_MEMORY, NOT_HERE, FAILED = "out of memory", "cannot run here", "failed with"
RECOMPUTE: dict[str, dict[str, Any]] = {"": {}, ", full recompute": {"recompute_granularity": "full"}}
_TE = {"transformer_impl": "transformer_engine"}
LINEAR_LAYERS: dict[str, dict[str, Any]] = {
    ", Transformer Engine": _TE,
    ", FP8 delayed": _TE | {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    ", FP8 tensorwise": _TE | {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
}
"""Suffix of a loop's name -> settings of training."""
FLASH = "transformers, flash-attn and Liger"
PROFILED = ("megatron-vlm, packed", "megatron-vlm, packed, FP8 delayed")


@dataclass
class Measured:
    """Timing of one training loop, or why it could not be measured."""

    name: str
    seconds: list[float]
    """Per row, the median over rounds."""
    peak_bytes: int
    loss: float
    """Of the first row, before training."""
    failed: str = ""


@dataclass
class Workload:
    """The same samples, unpacked and packed."""

    samples: list[list[Sample]]
    rows: list[PackedBatch]
    flops: list[float]
    """Of each row's training step."""


def step_flops(recipe: Recipe, samples: list[Sample]) -> float:
    """Floating-point operations of forward and backward on these samples."""
    return step_operations(
        recipe.model,
        tuple(recipe.training.trainable),
        squared_tokens=sum(len(sample) ** 2 for sample in samples),
        tokens=sum(map(len, samples)),
        tiles=sum(len(sample.tiles) for sample in samples),
        supervised_tokens=sum(int((s.document.encoded.labels[1:] != IGNORE_INDEX).sum()) for s in samples),
        adapters=lora_parameters(recipe.model.language, recipe.training),
    )


def build_workload(recipe: Recipe, rows: int) -> Workload:
    source = InstructRows(recipe.model, recipe.data.seq_length, recipe.data.max_tiles_per_row)
    samples = [source.samples(row) for row in range(rows)]
    return Workload(samples, [source.pack(row) for row in samples], [step_flops(recipe, row) for row in samples])


def measure(name: str, build: Callable[[], tuple[Any, list[Any]]], rounds: int) -> Measured:
    """Build a loop and its steps, run each step once to warm up, then time `rounds` rounds; frees all memory."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    try:
        loop, steps = build()
        losses = [loop.step(step) for step in steps]
        times = [[time_call(partial(loop.step, step)) for step in steps] for _ in range(rounds)]
        medians = [statistics.median(row) for row in zip(*times, strict=True)]
        result = Measured(name, medians, torch.cuda.max_memory_allocated() if on_gpu() else 0, losses[0])
    except ConfigError as error:  # Transformer Engine is not here
        print(error, flush=True)
        result = Measured(name, [], 0, float("nan"), NOT_HERE)
    except Exception as error:  # of one loop: the others are measured all the same
        if is_out_of_memory(error):
            result = Measured(name, [], 0, float("nan"), OUT_OF_MEMORY)
        else:
            traceback.print_exc()
            result = Measured(name, [], 0, float("nan"), f"{FAILED} {type(error).__name__}")
    loop, steps = None, []
    free_memory()
    return result


def check_none_failed(results: list[Measured]) -> None:
    """Raises SystemExit if a loop ended with an error, after the others were reported."""
    if failed := [f"{result.name} {result.failed}" for result in results if result.failed.startswith(FAILED)]:
        raise SystemExit(f"{'; '.join(failed)}: see above")


def free_memory() -> None:
    """Of models that are no longer referenced."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def packed_loop(recipe: Recipe, work: Workload, model: Any) -> tuple[PackedLoop, list[Any]]:
    """Our training step with the weights of a transformers `model`, and its steps, one for each row."""
    model.to("cpu")  # PackedLoop copies the weights
    loop = PackedLoop(model, replace(recipe, training=replace(recipe.training, global_batch_size=1)))
    return loop, [[loop.prepare(row)] for row in work.rows]


def loops(
    recipe: Recipe, work: Workload, model: Any, micro_batches: list[int]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that builds the loop and its steps) of each loop to measure."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    def ours(settings: dict[str, Any]) -> tuple[Any, list[Any]]:
        training = replace(recipe.training, **{"recompute_granularity": None, **settings})
        return packed_loop(replace(recipe, training=training), work, model)

    def theirs(settings: dict[str, Any], size: int, flash: bool) -> tuple[Any, list[Any]]:
        model.load_state_dict(state)
        model.gradient_checkpointing_disable()
        model.to(current_device())
        training = replace(recipe.training, **{"recompute_granularity": None, **settings})
        collate = transformers_flash.flatten if flash else transformers_loop.collate
        steps = [transformers_loop.micro_batches(row, size, current_device(), collate) for row in work.samples]
        loop = transformers_flash.FlashLoop if flash else transformers_loop.Loop
        return loop(model, replace(recipe, training=training)), steps

    for suffix, settings in {**RECOMPUTE, **LINEAR_LAYERS}.items():
        yield f"megatron-vlm, packed{suffix}", partial(ours, settings)
    for size in micro_batches:
        for suffix, settings in RECOMPUTE.items():
            yield f"transformers, micro-batch {size}{suffix}", partial(theirs, settings, size, False)
    if reason := transformers_flash.why_not():
        print(f"{FLASH}: {NOT_HERE}: {reason}", flush=True)
        return
    whole = max(map(len, work.samples))
    for size in [*micro_batches, whole]:  # last, because they change the model
        for suffix, settings in RECOMPUTE.items():
            name = "whole row" if size == whole else f"micro-batch {size}"
            yield f"{FLASH}, {name}{suffix}", partial(theirs, settings, size, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe that gives the model and the row length")
    parser.add_argument("--rows", type=int, default=4, help="rows; each is one optimizer step")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all rows; medians are reported")
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 4], help="transformers' micro-batch sizes")
    parser.add_argument("--loops", nargs="+", metavar="NAME", help="only these of the table; default: all")
    parser.add_argument("--profile", type=Path, help="write one of our steps' kernels, by time, to this file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config)
    recipe.parallel = ParallelConfig()
    with distributed(recipe.parallel):
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run the benchmark and report it."""
    torch.manual_seed(0)
    work = build_workload(recipe, arguments.rows)
    peak = measured_gemm_rate(torch.bfloat16 if recipe.training.bf16 else torch.float32)
    with torch.device(current_device()):
        model = transformers_loop.build(recipe)
    results: list[Measured] = []
    kinds: dict[str, dict[str, float]] = {}
    for name, build in loops(recipe, work, model, arguments.micro_batches):
        if arguments.loops and name not in arguments.loops:
            continue
        results.append(measure(name, build, arguments.rounds))
        print(f"{name}: {results[-1].failed or results[-1].seconds}", flush=True)
        if not results[-1].failed and name in PROFILED:
            kinds[name] = profile_step(name, arguments.profile if not kinds else None, build)
            free_memory()
    check_same_loss(results, recipe)
    if all(result.failed for result in results):
        raise SystemExit(f"no loop ran: {[result.name for result in results] or arguments.loops}")
    report(arguments, recipe, work, results, peak, kinds)
    check_none_failed(results)


def check_same_loss(results: list[Measured], recipe: Recipe) -> None:
    """All loops must have the same loss before training; raises SystemExit if not."""
    losses = {result.name: result.loss for result in results if not result.failed}
    reference = next(iter(losses.values()), 0.0)
    for name, loss in losses.items():
        if not abs(loss - reference) <= LOSS_TOLERANCE[recipe.training.bf16] * reference:
            raise SystemExit(f"losses on the same samples differ: {name} {loss:.6f}, ours {reference:.6f}")


def profile_step(name: str, path: Path | None, build: Callable[[], tuple[Any, list[Any]]]) -> dict[str, float]:
    """Profile one step: print its time by kind of work, and write that of each kernel if there is a `path`."""
    loop, steps = build()
    loop.step(steps[0])
    with torch.profiler.profile() as profile:
        time_call(lambda: loop.step(steps[0]))
    kinds = seconds_by_kind(profile)
    print(f"\n{name}, one step by kind of work:")
    print(table(["", "ms"], [[kind, f"{1000 * seconds:.1f}"] for kind, seconds in kinds.items()]), flush=True)
    if path is None:
        return kinds
    order = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90))
    return kinds


def report(
    arguments: argparse.Namespace,
    recipe: Recipe,
    work: Workload,
    results: list[Measured],
    peak: float,
    kinds: dict[str, dict[str, float]],
) -> None:
    """Print the table and write the JSON."""
    samples, tiles = sum(map(len, work.samples)), sum(row.num_tiles for row in work.rows)
    tokens, flops = sum(row.num_tokens for row in work.rows), sum(work.flops)
    about = machine()
    print(
        f"\n{about['device']}, torch {about['torch']}, megatron-core {about['megatron-core']}, transformers "
        f"{about['transformers']}; {'bf16' if recipe.training.bf16 else 'fp32'}; measured GEMM peak "
        f"{peak / 1e12:.3g} TFLOP/s\n{len(work.rows)} rows of {recipe.data.seq_length} tokens, one per step: {samples} "
        f"samples, {tokens:,} tokens, {tiles} tiles; median of {arguments.rounds} rounds\n"
    )
    reference = next(result for result in results if not result.failed)
    datasheet = datasheet_peak(about["device"]) if recipe.training.bf16 else None
    lines = []
    for result in results:
        if result.failed:
            lines.append([result.name, result.failed, "", "", "", "", ""])
            continue
        elapsed = sum(result.seconds)
        rate = flops / elapsed
        mfu = f"{100 * rate / datasheet:.1f} %" if datasheet else "-"
        lines.append(
            [result.name, f"{elapsed / len(work.rows):.3f}", f"{tokens / elapsed:,.0f}", f"{100 * rate / peak:.1f} %",
             mfu, f"{result.peak_bytes / 2**30:.1f}", f"{elapsed / sum(reference.seconds):.2f}x"]
        )  # fmt: skip
    header = ["training loop", "s per row", "tokens/s", "% of measured GEMM peak", "MFU", "peak GiB"]
    header.append(f"time / {reference.name}")
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
            "flops": flops,
            "gemm_flops_per_second": peak,
            "loops": [asdict(result) for result in results],
            "seconds_by_kind": kinds,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
