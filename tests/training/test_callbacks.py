"""Callbacks are called at every step, save and evaluation; a profiler window writes its trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_recipe
from megatron_vlm.training.callbacks import Callback
from megatron_vlm.training.trainer import Trainer
from tests.training.tiny_run import metrics, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.losses: list[float] = []

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.calls.append(("step", iteration))
        self.losses.append(metrics["lm_loss"])

    def on_eval(self, iteration: int, metrics: dict[str, float]) -> None:
        assert metrics["eval_loss"] > 0
        self.calls.append(("eval", iteration))

    def on_save(self, iteration: int, checkpoint: Path) -> None:
        assert (checkpoint / "recipe.json").is_file()
        self.calls.append(("save", iteration))


def test_callbacks_and_profiler(tmp_path: Path) -> None:
    training = {
        "save": str(tmp_path / "run"), "train_iters": 4, "save_interval": 2, "eval_interval": 4, "async_save": False,
        "profile_step_start": 2, "profile_step_end": 3, "log_interval": 3,
    }  # fmt: skip
    data = {"num_workers": 0, "valid_share": 0.2}
    recorder = Recorder()
    Trainer(load_recipe(write_recipe(tmp_path), {"training": training, "data": data}), [recorder]).train()
    steps = [("step", 1), ("step", 2), ("save", 2), ("step", 3), ("step", 4), ("eval", 4), ("save", 4)]
    assert recorder.calls == steps
    lines = metrics(tmp_path / "run")
    assert [line["lm_loss"] for line in lines] == recorder.losses
    assert [line["iteration"] for line in lines if "grad_norm/vision" in line] == [3, 4]
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "iterations-2-3.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
