"""The seam to logging systems: each writes the metrics of an iteration, and the answers generated after it.

A system that is not asked for is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.json_lines import keep_lines
from megatron_vlm.training.metrics.answers import Answer
from megatron_vlm.training.metrics.trackers import MLflow, WandB

METRICS_FILE = "metrics.jsonl"
ANSWERS_FILE = "generated_samples.jsonl"


class MetricWriter(Protocol):
    """Writes metrics somewhere; on rank 0."""

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        """Write the metrics of an iteration, by name."""

    def write_answers(self, iteration: int, answers: Sequence[Answer]) -> None:
        """Write what the model answered after an iteration, whose metrics are written."""

    def close(self) -> None:
        """Finish what is being written."""


def open_writers(recipe: Recipe, folder: Path, first_iteration: int) -> list[MetricWriter]:
    """The writers of a recipe. What a killed run wrote after `first_iteration` is removed where that is possible."""
    writers: list[MetricWriter] = [
        JsonLines(folder, first_iteration),
        TensorBoard(folder / "tensorboard", first_iteration),
    ]
    if recipe.training.wandb_project is not None:
        writers.append(WandB(recipe, folder))
    if recipe.training.mlflow_experiment is not None:
        writers.append(MLflow(recipe, folder))
    return writers


class JsonLines:
    """metrics.jsonl: one object per iteration; generated_samples.jsonl, if there are any: one per answer."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        for path in (folder / METRICS_FILE, folder / ANSWERS_FILE):
            if path.is_file():
                keep_lines(path, lambda line: line["iteration"] <= first_iteration)
        self._file = (folder / METRICS_FILE).open("a")
        self._answers = folder / ANSWERS_FILE

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        # JSON has no NaN
        known = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        self._file.write(json.dumps({"iteration": iteration, **known}) + "\n")
        self._file.flush()

    def write_answers(self, iteration: int, answers: Sequence[Answer]) -> None:
        with self._answers.open("a") as file:
            for answer in answers:
                file.write(json.dumps({"iteration": iteration, **answer.as_line()}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_iteration + 1)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def write_answers(self, iteration: int, answers: Sequence[Answer]) -> None:
        for number, answer in enumerate(answers):
            panel = np.asarray(answer.panel())
            self._writer.add_image(f"generated_samples/{number}", panel, iteration, dataformats="HWC")
            self._writer.add_text(f"generated_samples/{number}", answer.as_markdown(), iteration)

    def flush(self) -> None:
        """Until everything is in the file; a thread writes it."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
