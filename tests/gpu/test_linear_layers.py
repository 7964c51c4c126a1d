"""Transformer Engine's layers, in bf16 and FP8, have the losses of megatron-core's own, where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gpu import run_linear_layers
from tests.support.launch import launch

pytestmark = pytest.mark.gpu
SCRIPT = Path(run_linear_layers.__file__)
STEPS = 20
BF16, FP8 = 1e-3, 1e-2
"""Relative difference of a step's loss from that of the local layers, on average over the steps."""


def test_losses_over_20_steps(tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    kinds = ["local", "transformer_engine", "fp8_delayed", "fp8_tensorwise"]
    done = launch(SCRIPT, file, str(STEPS), *kinds, ranks=1, timeout=280, check=False)
    if find_spec("transformer_engine") is None:
        assert "Install Transformer Engine for PyTorch" in done.stdout
        return
    assert done.returncode == 0, done.stdout
    losses = json.loads(file.read_text())
    for kind, tolerance in zip(kinds[1:], (BF16, FP8, FP8), strict=True):
        differences = [abs(a / b - 1) for a, b in zip(losses[kind], losses["local"], strict=True)]
        assert sum(differences) / STEPS < tolerance, (kind, differences)
