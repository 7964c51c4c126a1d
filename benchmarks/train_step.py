"""Speed of our packed training step and of a plain transformers loop, on the same model, weights, samples and threads.

    python -m benchmarks.train_step

Three loops train on the same samples in the same number of optimizer steps: ours on packed rows, transformers on
batches padded to their longest sample, and transformers on batches of samples grouped by length. They run in one
process and take turns step by step; the optimizer is included. Before timing, both sides must have the same loss on the
same samples. The last figure is the time per token on a sample that fills a row alone, where packing cannot help.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import transformers_loop
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.support.samples import SampleGenerator, Workload, build_workload
from megatron_vlm.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.data.rows.rank_batch import AnyBatch, RankBatch, rank_batch
from megatron_vlm.model.build import build_model
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.finite_update import update_and_loss
from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss, sum_over_ranks

LOSS_TOLERANCE = 1e-4
"""Relative difference allowed between the two loops' fp32 losses on the same samples."""


def recipe_of(rows_per_step: int, seq_length: int) -> Recipe:
    """A small model with the real one's proportions: output layer 9 % of the decoder, vision tower a quarter.

    Features come from the tower's last layer, so that both loops run the same layers: transformers also runs the
    layers after the feature layer, which would weigh too much in a tower of three layers.
    """
    vision = VisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=3, image_size=48,
        patch_size=8, vision_feature_layer=-1,
    )  # fmt: skip
    language = LanguageConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=1664, max_position_embeddings=seq_length,
    )  # fmt: skip
    return Recipe(
        model=ModelConfig(vision, language, image_token_index=1663, image_grid_pinpoints=[[48, 48]]),
        data=DataConfig(seq_length=seq_length),
        training=TrainingConfig(global_batch_size=rows_per_step, lr=1e-4),
        parallel=ParallelConfig(),
    )


class PackedLoop:
    """Our training step on prepared rows, starting from the weights of a transformers model."""

    def __init__(self, weights: torch.nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        (model,) = chunks = build_model(recipe, for_training=True)
        transformers_loop.copy_weights(weights, model, recipe)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)

    def prepare(self, batch: PackedBatch) -> RankBatch:
        """What a loader's worker makes of a row, in page-locked memory on a GPU: no part of a step's time."""
        row = rank_batch(batch, rank_view(self.recipe))
        return row.pin_memory() if on_gpu() else row

    def forward_backward(self, rows: Sequence[AnyBatch]) -> float:
        """Accumulate gradients of the mean loss over the step's supervised tokens; returns that mean."""
        return global_loss(forward_backward(self.chunks, [iter(rows)], self.recipe))[0]

    def step(self, rows: Sequence[AnyBatch]) -> float:
        """One optimizer step."""
        totals = sum_over_ranks(forward_backward(self.chunks, [iter(rows)], self.recipe))
        _, _, loss, _ = update_and_loss(self.optimizer, totals)
        return loss


def time_call(step: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, until the device has finished."""
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(loops: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round of each loop. In a round each loop runs all its steps once; the loops take turns step by step.

    The loop that goes first changes from step to step. The first round is a warm-up and is not counted.
    """
    names = list(loops)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        elapsed = dict.fromkeys(names, 0.0)
        for step in range(len(loops[names[0]])):
            first = (number + step) % len(names)
            for name in names[first:] + names[:first]:
                elapsed[name] += time_call(loops[name][step])
        if number:
            for name in names:
                times[name].append(elapsed[name])
    return times


def check_same_loss(ours: PackedLoop, theirs: transformers_loop.Loop, work: Workload, micro_batch: int) -> float:
    """Relative difference of the two losses on the first step's samples, before training."""
    loss = ours.forward_backward(work.rows[0])
    other = theirs.forward_backward(transformers_loop.micro_batches(work.packed[0], micro_batch, theirs.model.device))
    ours.optimizer.zero_grad()
    theirs.optimizer.zero_grad()
    difference = abs(loss - other) / other
    if difference > LOSS_TOLERANCE:
        raise SystemExit(f"losses on the same samples differ: ours {loss:.6f}, transformers {other:.6f}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per round")
    parser.add_argument("--rows", type=int, default=2, help="rows per optimizer step")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--micro-batch", type=int, default=0, help="transformers' micro-batch size; 0: a whole step")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: one per core")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments.rows, arguments.seq_length)
    with distributed(recipe.parallel):
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run the benchmark and report it."""
    torch.manual_seed(0)
    seq_length, rows = recipe.data.seq_length, recipe.training.global_batch_size
    generator = SampleGenerator(recipe.model, seed=0)
    work = build_workload(generator, arguments.steps, rows, seq_length)
    model = transformers_loop.build(recipe).to(current_device())
    ours, theirs = PackedLoop(model, recipe), transformers_loop.Loop(model, recipe)
    micro_batch = arguments.micro_batch or max(map(len, work.packed))
    difference = check_same_loss(ours, theirs, work, micro_batch)

    def batches(steps: list[Any]) -> list[list[transformers_loop.Batch]]:
        return [transformers_loop.micro_batches(step, micro_batch, current_device()) for step in steps]

    padded, grouped = batches(work.padded), batches(work.grouped)
    times = interleave(
        {
            "megatron-vlm, packed": [partial(ours.step, [ours.prepare(row) for row in step]) for step in work.rows],
            "transformers, padded": [partial(theirs.step, step) for step in padded],
            "transformers, grouped by length": [partial(theirs.step, step) for step in grouped],
        },
        arguments.rounds,
    )
    processed = [
        len(work.rows) * rows * seq_length,
        sum(map(transformers_loop.padded_tokens, padded)),
        sum(map(transformers_loop.padded_tokens, grouped)),
    ]
    full = [generator.row_long_sample(seq_length) for _ in range(rows)]
    full_rows = [ours.prepare(generator.row([sample], seq_length)) for sample in full]
    full_batches = transformers_loop.micro_batches(full, 1, current_device())
    full_times = interleave(
        {"ours": [partial(ours.step, full_rows)], "theirs": [partial(theirs.step, full_batches)]}, 2 * arguments.rounds
    )
    report(arguments, work, times, processed, full_times, difference, micro_batch)


def report(
    arguments: argparse.Namespace,
    work: Workload,
    times: dict[str, list[float]],
    processed: list[int],
    full_times: dict[str, list[float]],
    difference: float,
    micro_batch: int,
) -> None:
    """Print the tables and write the JSON."""
    lengths = [len(sample) for step in work.padded for sample in step]
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    names = list(times)
    speed = {name: work.samples / medians[name] for name in names}
    ratio = {name: speed[names[0]] / speed[name] for name in names}
    full_cost = {
        name: 1e6 * statistics.median(rounds) / (arguments.rows * arguments.seq_length)
        for name, rounds in full_times.items()
    }
    about = machine()
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, "
        f"megatron-core {about['megatron-core']}, transformers {about['transformers']}"
    )
    print(
        f"{work.samples} samples of {min(lengths)} to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f}) in "
        f"{len(work.rows)} optimizer steps; rows of {arguments.seq_length} tokens; transformers' micro-batch: "
        f"{micro_batch} samples; median of {arguments.rounds} rounds; relative loss difference {difference:.1e}\n"
    )
    print(
        table(
            ["training loop", "samples/s", "tokens/s", "tokens that are not padding", "speedup of packing"],
            [
                [
                    name,
                    f"{speed[name]:.1f}",
                    f"{work.tokens / medians[name]:,.0f}",
                    f"{100 * work.tokens / tokens:.1f} %",
                    f"{ratio[name]:.2f}x",
                ]
                for name, tokens in zip(names, processed, strict=True)
            ],
        )
    )
    cost_ratio = full_cost["ours"] / full_cost["theirs"]
    print(
        f"\nTime per token on a sample that fills a row alone: {full_cost['ours']:.1f} us, transformers "
        f"{full_cost['theirs']:.1f} us, ratio {cost_ratio:.2f}"
    )
    path = save(
        arguments.output,
        "train_step",
        {
            "settings": {name: getattr(arguments, name) for name in ("rounds", "steps", "rows", "seq_length")},
            "micro_batch": micro_batch,
            "samples": work.samples,
            "tokens": work.tokens,
            "tokens_processed": dict(zip(names, processed, strict=True)),
            "seconds": times,
            "samples_per_second": speed,
            "speedup_of_packing": ratio,
            "full_row_seconds": full_times,
            "full_row_cost_ratio": cost_ratio,
            "loss_difference": difference,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
