"""Weights & Biases and MLflow. Neither is imported unless a recipe asks for it.

A run that is started again continues its own record: the record's id is kept in the save folder.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.config import ConfigError, Recipe, recipe_to_dict
from megatron_vlm.runtime.atomic_files import atomic_file
from megatron_vlm.training.metrics.answers import Answer

_WANDB_ID, _MLFLOW_ID = "wandb_run_id.txt", "mlflow_run_id.txt"
_MAX_VALUE = 500
"""MLflow rejects longer values of parameters."""


class WandB:
    """A run of the project training.wandb_project."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """
        Raises:
            ConfigError: wandb is not installed.
        """
        self._wandb: Any = _import("wandb", "training.wandb_project")
        training = recipe.training
        self._run: Any = self._wandb.init(
            project=training.wandb_project,
            name=training.wandb_exp_name or folder.resolve().name,
            dir=str(folder),
            config=recipe_to_dict(recipe),
            id=_read_id(folder / _WANDB_ID),
            resume="allow",
        )
        _write_id(folder / _WANDB_ID, self._run.id)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=iteration)

    def write_answers(self, iteration: int, answers: Sequence[Answer]) -> None:
        panels = [self._wandb.Image(answer.panel(), caption=answer.sample_id) for answer in answers]
        self._run.log({"generated_samples": panels}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment training.mlflow_experiment."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """
        Raises:
            ConfigError: mlflow is not installed.
        """
        self._mlflow: Any = _import("mlflow", "training.mlflow_experiment")
        training = recipe.training
        if training.mlflow_tracking_uri is not None:
            self._mlflow.set_tracking_uri(training.mlflow_tracking_uri)
        self._mlflow.set_experiment(training.mlflow_experiment)
        known = _read_id(folder / _MLFLOW_ID)
        if known is not None:
            self._mlflow.start_run(run_id=known)
            return
        run = self._mlflow.start_run(run_name=folder.resolve().name)
        self._mlflow.log_params({name: str(value)[:_MAX_VALUE] for name, value in _flat(recipe_to_dict(recipe))})
        _write_id(folder / _MLFLOW_ID, run.info.run_id)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        allowed = {re.sub(r"[^\w\-. /]", "_", name): float(value) for name, value in values.items()}
        self._mlflow.log_metrics(allowed, step=iteration)

    def write_answers(self, iteration: int, answers: Sequence[Answer]) -> None:
        folder = f"generated_samples/{iteration:07d}"
        for number, answer in enumerate(answers):
            self._mlflow.log_image(answer.panel(), f"{folder}/{number}.png")
        self._mlflow.log_dict({"answers": [answer.as_line() for answer in answers]}, f"{folder}/answers.json")

    def close(self) -> None:
        self._mlflow.end_run()


def _import(package: str, setting: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs the package {package}, which cannot be imported ({error}). Install it (pip install "
            f"'megatron-vlm[tracking]'), or unset {setting}."
        ) from error


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_id(path: Path) -> str | None:
    return path.read_text().strip() or None if path.is_file() else None


def _write_id(path: Path, value: str) -> None:
    with atomic_file(path) as file:
        file.write(value.encode())
