"""Where metrics go: a log line every log_interval iterations, metrics.jsonl and TensorBoard for every iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.training.metrics.answers import Answer
from megatron_vlm.training.metrics.writers import METRICS_FILE as METRICS_FILE
from megatron_vlm.training.metrics.writers import MetricWriter, TensorBoard, open_writers
from megatron_vlm.training.run_files import run_folder

Line = tuple[int, dict[str, Any]]
"""(iteration, metrics)"""


class MetricsLog:
    """Writes metrics on rank 0; does nothing on other ranks."""

    def __init__(self, recipe: Recipe, first_iteration: int) -> None:
        """
        Args:
            recipe: of the run.
            first_iteration: iteration of the checkpoint that it resumes from; what a killed run wrote after it is
                removed.
        """
        self.recipe = recipe
        self._writers: list[MetricWriter] = []
        folder = run_folder(recipe)
        if dist.get_rank() == 0 and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._writers = open_writers(recipe, folder, first_iteration)

    def write(self, lines: list[Line], answers: Mapping[int, Sequence[Answer]]) -> None:
        """Write the metrics of consecutive iterations, and log those of the last one.

        `answers` are those generated after some of the iterations.
        """
        for iteration, values in lines:
            for writer in self._writers:
                writer.write(iteration, values)
                if iteration in answers:
                    writer.write_answers(iteration, answers[iteration])
        log_rank0(self._describe(lines))

    def _describe(self, lines: list[Line]) -> str:
        iteration, values = lines[-1]
        total = self.recipe.training.train_iters
        elapsed = sum(metrics["step_seconds"] for _, metrics in lines)
        tokens = sum(metrics["tokens"] for _, metrics in lines)
        utilization = "".join(
            f" | {name} {100 * sum(metrics[key] * metrics['step_seconds'] for _, metrics in lines) / elapsed:.1f} %"
            for key, name in (("mfu", "MFU"), ("gemm_utilization", "GEMM"))
            if key in values
        )
        left = elapsed / len(lines) * (total - iteration)
        return (
            f"iteration {iteration:>{len(str(total))}}/{total} | lm loss {values['lm_loss']:.4f} | "
            f"grad norm {values['grad_norm']:.3f} | lr {values['learning_rate']:.2e} | "
            f"packing {100 * values['pack_fill']:.1f} % | {tokens / elapsed:,.0f} tokens/s{utilization} | "
            f"data wait {values['data_wait_ms']:.0f} ms | {describe_duration(left)} left"
        )

    def sync(self) -> None:
        """Until everything written so far is in the files."""
        for writer in self._writers:
            if isinstance(writer, TensorBoard):
                writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def describe_duration(seconds: float) -> str:
    """Such as 2 d 3 h, 4 h 5 min, 6 min, 7 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes % (24 * 60) // 60} h"
