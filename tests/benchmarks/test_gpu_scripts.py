"""The scripts that `make gpu-check` runs on a GPU run on a CPU, with what a CPU has."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.gpu import run_linear_layers, run_step
from tests.support.launch import launch


def test_steps_of_the_test_model(tmp_path: Path) -> None:
    launch(Path(run_step.__file__), tmp_path / "steps.pt", "bf16", ranks=1, timeout=120)
    result = torch.load(tmp_path / "steps.pt")
    assert result["device"] == "cpu" and len(result["steps"]) == 3


def test_losses_of_linear_layers(tmp_path: Path) -> None:
    launch(Path(run_linear_layers.__file__), tmp_path / "losses.json", "3", "local", ranks=1, timeout=120)
    losses = json.loads((tmp_path / "losses.json").read_text())["local"]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_settings_of_the_kinds() -> None:
    assert run_linear_layers.settings_of("local") == {}
    assert run_linear_layers.settings_of("fp8_tensorwise") == {
        "transformer_impl": "transformer_engine", "fp8_format": "hybrid", "fp8_recipe": "tensorwise",
    }  # fmt: skip
