"""Weights & Biases and MLflow: values and generated answers arrive, a run that is started again continues its record,
nothing is imported unasked.

Neither package is a requirement of the tests: stand-ins take the calls with the packages' own signatures, and where the
packages are installed they are used too, on folders of this machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.training.metrics import Answer
from megatron_vlm.training.metrics.writers import open_writers

ANSWER = Answer("s1", "<image>\nWhat is it?", "A dog.", "A cat.", [Image.new("RGB", (640, 480))])


class MLflowStandIn(ModuleType):
    """The functions of mlflow's fluent interface that are used."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.uri: str | None = None
        self.experiment, self.active = "", ""
        self.runs: dict[str, dict[str, Any]] = {}

    def set_tracking_uri(self, uri: str) -> None:
        self.uri = uri

    def set_experiment(self, experiment_name: str) -> None:
        self.experiment = experiment_name

    def start_run(
        self, run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None
    ) -> Any:
        assert not self.active
        self.active = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.active, {"name": run_name, "params": {}, "metrics": []})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_params(self, params: dict[str, Any]) -> None:
        assert all(len(value) <= 500 for value in params.values())
        self.runs[self.active]["params"] |= params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.runs[self.active]["metrics"].append((step, metrics))

    def log_image(self, image: Image.Image, artifact_file: str | None = None) -> None:
        self.runs[self.active].setdefault("images", []).append((artifact_file, image.size))

    def log_dict(self, dictionary: dict[str, Any], artifact_file: str) -> None:
        self.runs[self.active].setdefault("texts", []).append((artifact_file, dictionary))

    def end_run(self, status: str = "FINISHED") -> None:
        self.active = ""


class WandbStandIn(ModuleType):
    """wandb.init and the methods of a run that are used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[dict[str, Any]] = []
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.Image = lambda data, caption=None: (data.size, caption)

    def init(
        self, *, project: str | None = None, name: str | None = None, dir: str | None = None,
        config: dict[str, Any] | None = None, id: str | None = None, resume: str | None = None,
    ) -> Any:  # fmt: skip
        self.calls.append({"project": project, "name": name, "id": id, "resume": resume, "config": config})

        def log(data: dict[str, Any], step: int | None = None) -> None:
            self.logged.append((step, data))

        return SimpleNamespace(id=id or "fresh", log=log, finish=lambda: None)


def _recipe(**training: Any) -> Recipe:
    recipe = Recipe()
    for name, value in training.items():
        setattr(recipe.training, name, value)
    return recipe


def _write(recipe: Recipe, folder: Path, iteration: int) -> None:
    folder.mkdir(exist_ok=True)
    writers = open_writers(recipe, folder, iteration - 1)
    for writer in writers:
        writer.write(iteration, {"lm_loss": 1.5 / iteration, "eval_loss/a:b": 2.0, "tokens": 7})
        if iteration == 2:
            writer.write_answers(iteration, [ANSWER])
    for writer in writers:
        writer.close()


def test_mlflow_gets_settings_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MLflowStandIn()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    recipe = _recipe(mlflow_experiment="vlm", mlflow_tracking_uri="file:/somewhere")
    _write(recipe, tmp_path / "save", 1)
    _write(recipe, tmp_path / "save", 2)
    assert (mlflow.uri, mlflow.experiment) == ("file:/somewhere", "vlm")
    (run,) = mlflow.runs.values()
    assert run["name"] == "save" and run["params"]["training.lr"] == "1e-05"
    values = {"eval_loss/a_b": 2.0, "tokens": 7.0}
    assert run["metrics"] == [(1, {"lm_loss": 1.5, **values}), (2, {"lm_loss": 0.75, **values})]
    ((file, size),) = run["images"]
    assert (file, size) == ("generated_samples/0000002/0.png", ANSWER.panel().size)
    ((file, texts),) = run["texts"]
    assert file == "generated_samples/0000002/answers.json" and texts["answers"][0]["generated"] == "A cat."


def test_mlflow_on_its_own_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = _recipe(mlflow_experiment="vlm", mlflow_tracking_uri=(tmp_path / "store").as_uri())
    _write(recipe, tmp_path / "save", 1)
    _write(recipe, tmp_path / "save", 2)
    client = mlflow.MlflowClient(tracking_uri=recipe.training.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name("vlm")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "lm_loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.75)]
    assert run.data.params["training.lr"] == "1e-05"
    (folder,) = client.list_artifacts(run.info.run_id, "generated_samples")
    files = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, folder.path)]
    assert sorted(files) == ["0.png", "answers.json"]


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = _recipe(wandb_project="vlm", wandb_exp_name="first")
    _write(recipe, tmp_path / "save", 1)
    _write(recipe, tmp_path / "save", 2)
    assert [(call["project"], call["name"], call["id"]) for call in wandb.calls] == [
        ("vlm", "first", None),
        ("vlm", "first", "fresh"),
    ]
    assert wandb.calls[0]["config"]["training"]["lr"] == 1e-5
    assert [step for step, _ in wandb.logged] == [1, 2, 2] and wandb.logged[1][1]["lm_loss"] == 0.75
    assert wandb.logged[2][1]["generated_samples"] == [(ANSWER.panel().size, "s1")]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the import makes two folders
    for variable in ("TMPDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _write(_recipe(wandb_project="vlm"), tmp_path / "save", 2)
    assert list((tmp_path / "save" / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert list((tmp_path / "save" / "wandb").glob("offline-run-*/*.wandb"))


def test_without_being_asked_for_neither_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it is an error
    _write(Recipe(), tmp_path / "save", 1)
    with pytest.raises(ConfigError, match=r"wandb_project needs the package wandb.*megatron-vlm\[tracking\]"):
        open_writers(_recipe(wandb_project="vlm"), tmp_path, 0)
