"""Collects the metrics of each step on every rank, and reduces and writes them once every log_interval iterations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config import PARTS, Recipe
from megatron_vlm.config.lora import is_trained, lora_parameters
from megatron_vlm.data.packing.row_cost import step_operations
from megatron_vlm.runtime.device import current_device, device_name, on_gpu
from megatron_vlm.runtime.peak_rate import datasheet_peak, measured_gemm_rate
from megatron_vlm.runtime.process_groups import ParallelRanks
from megatron_vlm.training.metrics.answers import Answer
from megatron_vlm.training.metrics.grad_norms import part_squares
from megatron_vlm.training.metrics.log import MetricsLog
from megatron_vlm.training.metrics.phases import PHASES, Marks, PhaseTimer, seconds
from megatron_vlm.training.metrics.row_counter import RowCounter, RowCounts

_GIB = 2**30


@dataclass
class _Step:
    """A step that is not reduced yet."""

    iteration: int
    values: dict[str, Any]
    """The same on every rank."""
    counts: RowCounts
    step_seconds: float
    squares: torch.Tensor | None
    """From part_squares."""
    marks: Marks = field(default_factory=list)


class MetricsProcessor:
    """Every rank makes one and makes the same calls.

    Between two reductions nothing is sent and nothing waits for the device.
    """

    def __init__(self, recipe: Recipe, ranks: ParallelRanks, first_iteration: int) -> None:
        self.recipe, self._ranks = recipe, ranks
        self.timer = PhaseTimer()
        self._log = MetricsLog(recipe, first_iteration)
        self._counter: RowCounter | None = None
        self._steps: list[_Step] = []
        self._answers: dict[int, Sequence[Answer]] = {}
        self._squares: torch.Tensor | None = None
        self._started = time.perf_counter()
        self._is_writing = dist.get_rank() == 0
        if self._is_writing:
            bf16 = recipe.training.bf16
            self._datasheet = datasheet_peak(device_name()) if bf16 else None
            self._gemm_rate = measured_gemm_rate(torch.bfloat16 if bf16 else torch.float32)

    def count(self, rows: Iterator[Any]) -> RowCounter:
        """The same rows, counted as they are read."""
        self._counter = RowCounter(rows, self._ranks, self.timer)
        return self._counter

    def is_due(self, iteration: int) -> bool:
        """Whether metrics are reduced after this iteration."""
        return iteration % self.recipe.training.log_interval == 0 or iteration == self.recipe.training.train_iters

    def start_step(self) -> None:
        self._started = time.perf_counter()
        self.timer.start_step()

    def measure_gradients(self, chunks: list[Any], iteration: int) -> None:
        """Call when the gradients of `iteration` are reduced, before they are used."""
        if self.is_due(iteration):
            self._squares = part_squares(chunks)

    def end_step(self, iteration: int, values: dict[str, Any]) -> list[str]:
        """Call when all work of a step is launched.

        Args:
            iteration: its number, from 1.
            values: metrics that are the same on every rank.

        Returns:
            Ids of the samples that this rank counts in the step.
        """
        assert self._counter is not None
        self.timer.end_step()
        counts, squares, self._squares = self._counter.take(), self._squares, None
        elapsed = time.perf_counter() - self._started
        self._steps.append(_Step(iteration, values, counts, elapsed, squares))
        return counts.sample_ids

    def add(self, values: dict[str, Any]) -> None:
        """More metrics of the last step, the same on every rank."""
        self._steps[-1].values |= values

    def add_answers(self, answers: Sequence[Answer]) -> None:
        """What the model generated after the last step; those of rank 0 are written with the metrics of the step."""
        self._answers[self._steps[-1].iteration] = answers

    def write(self) -> None:
        """End the last step: what is timed from now on belongs to the next. Reduce and write, if it is due."""
        self._steps[-1].marks = self.timer.take()
        if self.is_due(self._steps[-1].iteration):
            self.flush()

    def flush(self) -> None:
        """Reduce and write what was collected. A collective call."""
        steps, self._steps = self._steps, []
        answers, self._answers = self._answers, {}
        if not steps:
            return
        zero = torch.zeros(len(PARTS), dtype=torch.double, device=current_device())
        squares = torch.stack([zero if step.squares is None else step.squares for step in steps])
        # The squares are the only values that the device still has to compute. Reading them waits for it, so that all
        # marks are passed afterwards.
        squares_of_rank = squares.tolist()
        sums = torch.tensor(
            [
                [step.counts.tokens, step.counts.squared_tokens, step.counts.tiles, step.counts.rows, *own]
                for step, own in zip(steps, squares_of_rank, strict=True)
            ],
            dtype=torch.double,
            device=current_device(),
        )
        memory = _memory()
        longest = torch.tensor(
            [[step.counts.wait_seconds, *_phase_seconds(step.marks), *memory.values()] for step in steps],
            dtype=torch.double,
            device=current_device(),
        )
        dist.all_reduce(sums)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        if not self._is_writing:
            return
        lines = []
        for step, totals, maxima in zip(steps, sums.tolist(), longest.tolist(), strict=True):
            lines.append((step.iteration, self._values(step, totals, maxima, list(memory))))
        self._log.write(lines, answers)

    def _values(self, step: _Step, totals: list[float], maxima: list[float], memory: list[str]) -> dict[str, Any]:
        tokens, squared, tiles, rows, *squares = totals
        wait, *phases = maxima[: 2 + len(PHASES)]
        training = self.recipe.training
        operations = step_operations(
            self.recipe.model, tuple(training.trainable), squared_tokens=squared, tokens=tokens, tiles=tiles,
            supervised_tokens=step.values["loss_tokens"],
            adapters=lora_parameters(self.recipe.model.language, training),
        )  # fmt: skip
        rate = operations / step.step_seconds / dist.get_world_size()
        values = {
            **step.values,
            "tokens": int(tokens),
            "tiles": int(tiles),
            "pack_fill": tokens / (rows * self.recipe.data.seq_length),
            "tokens_per_second": tokens / step.step_seconds,
            "data_wait_ms": 1000 * wait,
            "step_seconds": step.step_seconds,
            **{f"{phase}_seconds": value for phase, value in zip(PHASES, phases, strict=False)},
            "device_idle_seconds": phases[-1],
            "tflops_per_device": rate / 1e12,
            "gemm_utilization": rate / self._gemm_rate,
        }
        if self._datasheet is not None:
            values["mfu"] = rate / self._datasheet
        if step.squares is not None:
            values |= {
                f"grad_norm/{part}": square**0.5
                for part, square in zip(PARTS, squares, strict=True)
                if is_trained(training, part)
            }
            values |= dict(zip(memory, maxima[2 + len(PHASES) :], strict=True))
        return values

    def sync(self) -> None:
        """Like flush, and wait until the files have everything. A collective call."""
        self.flush()
        self._log.sync()

    def close(self) -> None:
        """Write what is left; a collective call."""
        self.flush()
        self._log.close()


def _phase_seconds(marks: Marks) -> list[float]:
    phases, idle = seconds(marks)
    return [*phases.values(), idle]


def _memory() -> dict[str, float]:
    """GiB of this process: peaks of the device's allocator since the last call, and what is resident on the host."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = {"host_memory_gib": pages * 4096 / _GIB}
    if on_gpu():
        memory["device_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
        memory["device_memory_reserved_gib"] = torch.cuda.max_memory_reserved() / _GIB
        torch.cuda.reset_peak_memory_stats()
    return memory
