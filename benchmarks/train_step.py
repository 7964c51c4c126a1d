"""Our packed training step against a plain transformers loop, on the same model, weights, samples and threads.

    python -m benchmarks.train_step

Three loops train on the same samples in the same number of optimizer steps: ours on packed rows, transformers on
batches padded to their longest sample, and transformers with samples grouped by length first. All run in one process,
one step of each in turn, optimizer included; before the clock starts, both sides must give the same loss on the same
samples. The last figure is the cost of a token where packing has nothing to win: one conversation as long as a row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from benchmarks import transformers_loop
from benchmarks.report import RESULTS, machine, save, table
from benchmarks.samples import SampleMaker, Work, draw_work
from checkpoint_convert.mapping.hf_names import canonical_name
from checkpoint_convert.mapping.param_map import name_map, to_megatron
from checkpoint_convert.megatron.files import tensors_of
from megatron_vlm.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.model.build import build_model
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss, update

SAME_LOSS = 1e-4
"""Relative difference allowed between the losses of the peers on the same samples, fp32."""


def recipe_of(rows_per_step: int, seq_length: int) -> Recipe:
    """A small model in the proportions of the real one: the output layer is 9 % of the decoder, the tower a quarter.

    The tower's feature is its last layer, so that both peers run the same layers: transformers also runs those whose
    output nothing uses, which in a tower of three would count for too much.
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
        (model,) = chunks = build_model(recipe)
        tensors = {canonical_name(name, "whole"): tensor for name, tensor in weights.state_dict().items()}
        tensors.pop("language_model.lm_head.weight")  # tied
        ours = tensors_of(model)
        with torch.no_grad():
            for name, tensor in to_megatron(name_map(recipe.model), tensors, "transformers"):
                ours[name].copy_(tensor)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)

    def forward_backward(self, rows: list[PackedBatch]) -> float:
        """Gradients of the mean over the step's loss tokens; returns that mean."""
        loss, _ = global_loss(forward_backward(self.chunks, [iter(rows)], self.recipe))
        return loss

    def step(self, rows: list[PackedBatch]) -> float:
        """One optimizer step."""
        loss = self.forward_backward(rows)
        update(self.optimizer)
        return loss


def seconds(step: Callable[[], Any]) -> float:
    """Wall clock of one call, the device's work included."""
    if on_gpu():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleave(loops: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each loop; a round is one call of each of its steps, the loops taking turns.

    Who begins changes from step to step. The first round is a warm-up and is not counted.
    """
    names = list(loops)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for step in range(len(loops[names[0]])):
            turn = (number + step) % len(names)
            for name in names[turn:] + names[:turn]:
                spent[name] += seconds(loops[name][step])
        if number:
            for name in names:
                times[name].append(spent[name])
    return times


def check_same_work(ours: PackedLoop, theirs: transformers_loop.Loop, work: Work, micro_batch: int) -> float:
    """The losses of both on the samples of the first step, before anything is trained; their relative difference."""
    loss = ours.forward_backward(work.rows[0])
    other = theirs.forward_backward(transformers_loop.micro_batches(work.packed[0], micro_batch, theirs.model.device))
    ours.optimizer.zero_grad()
    theirs.optimizer.zero_grad()
    difference = abs(loss - other) / other
    if difference > SAME_LOSS:
        raise SystemExit(f"the peers do not do the same work: loss {loss:.6f} and {other:.6f} on the same samples")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed; medians are reported")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps in a round")
    parser.add_argument("--rows", type=int, default=2, help="rows in an optimizer step")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens in a row")
    parser.add_argument(
        "--micro-batch", type=int, default=0, help="samples transformers takes at a time; 0: all of a step"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: one for every core")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments.rows, arguments.seq_length)
    with distributed(recipe.parallel):
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    seq_length, rows = recipe.data.seq_length, recipe.training.global_batch_size
    maker = SampleMaker(recipe.model, seed=0)
    work = draw_work(maker, arguments.steps, rows, seq_length)
    model = transformers_loop.build(recipe).to(current_device())
    ours, theirs = PackedLoop(model, recipe), transformers_loop.Loop(model, recipe)
    micro_batch = arguments.micro_batch or max(map(len, work.packed))
    difference = check_same_work(ours, theirs, work, micro_batch)

    def batches(steps: list[Any]) -> list[list[transformers_loop.Batch]]:
        return [transformers_loop.micro_batches(step, micro_batch, current_device()) for step in steps]

    padded, grouped = batches(work.padded), batches(work.grouped)
    times = interleave(
        {
            "megatron-vlm, packed": [lambda step=step: ours.step(step) for step in work.rows],
            "transformers, padded": [lambda step=step: theirs.step(step) for step in padded],
            "transformers, grouped by length": [lambda step=step: theirs.step(step) for step in grouped],
        },
        arguments.rounds,
    )
    passed = [
        len(work.rows) * rows * seq_length,
        sum(map(transformers_loop.padded_tokens, padded)),
        sum(map(transformers_loop.padded_tokens, grouped)),
    ]
    full = [maker.filled_row(seq_length) for _ in range(rows)]
    full_rows = [maker.row([sample], seq_length) for sample in full]
    full_batches = transformers_loop.micro_batches(full, 1, current_device())
    full_times = interleave(
        {"ours": [lambda: ours.step(full_rows)], "theirs": [lambda: theirs.step(full_batches)]}, 2 * arguments.rounds
    )
    report(arguments, work, times, passed, full_times, difference, micro_batch)


def report(
    arguments: argparse.Namespace,
    work: Work,
    times: dict[str, list[float]],
    passed: list[int],
    full_times: dict[str, list[float]],
    difference: float,
    micro_batch: int,
) -> None:
    """Print the tables and write the JSON."""
    lengths = [len(sample) for step in work.padded for sample in step]
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    names = list(times)
    speed = {name: work.samples / medians[name] for name in names}
    ratio = {name: speed[names[0]] / speed[name] for name in names}
    full_cost = {
        name: 1e6 * statistics.median(spent) / (arguments.rows * arguments.seq_length)
        for name, spent in full_times.items()
    }
    about = machine()
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, "
        f"megatron-core {about['megatron-core']}, transformers {about['transformers']}"
    )
    print(
        f"{work.samples} samples of {min(lengths)} to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f}) in "
        f"{len(work.rows)} optimizer steps; rows of {arguments.seq_length}; transformers takes {micro_batch} samples "
        f"at a time; median of {arguments.rounds} rounds; losses on the same samples differ by {difference:.1e}\n"
    )
    print(
        table(
            ["training loop", "samples/s", "tokens/s", "real tokens", "packed is faster by"],
            [
                [
                    name,
                    f"{speed[name]:.1f}",
                    f"{work.tokens / medians[name]:,.0f}",
                    f"{100 * work.tokens / tokens:.1f} %",
                    f"{ratio[name]:.2f}x",
                ]
                for name, tokens in zip(names, passed, strict=True)
            ],
        )
    )
    cost_ratio = full_cost["ours"] / full_cost["theirs"]
    print(
        f"\nOn a row that one conversation fills, a token costs us {full_cost['ours']:.1f} us and transformers "
        f"{full_cost['theirs']:.1f} us: {cost_ratio:.2f}x"
    )
    path = save(
        arguments.output,
        "train_step",
        {
            "settings": {name: getattr(arguments, name) for name in ("rounds", "steps", "rows", "seq_length")},
            "micro_batch": micro_batch,
            "samples": work.samples,
            "tokens": work.tokens,
            "tokens_passed": dict(zip(names, passed, strict=True)),
            "seconds": times,
            "samples_per_second": speed,
            "packed_is_faster_by": ratio,
            "full_row_seconds": full_times,
            "full_row_cost_ratio": cost_ratio,
            "loss_difference": difference,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
