"""A GPU has the gradients and losses of the CPU, which other tests compare with one process and with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.gradients import relative_differences
from tests.support.launch import launch

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parent / "run_step.py"


def _train(folder: Path, name: str, *options: str) -> dict[str, Any]:
    file = folder / f"{name}.pt"
    launch(SCRIPT, file, *options, ranks=1, timeout=280)
    result: dict[str, Any] = torch.load(file, map_location="cpu")
    return result


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            patch.setenv(name, "")
        result = _train(tmp_path_factory.mktemp("cpu"), "cpu")
    assert result["device"] == "cpu"
    steps: list[dict[str, Any]] = result["steps"]
    return steps


def test_fp32_gradients_are_the_cpus(on_cpu: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of the first step: in later ones the weights already differ by rounding."""
    result = _train(tmp_path, "gpu")
    assert result["device"] != "cpu"
    differences = relative_differences(result["steps"][0]["gradients"], on_cpu[0]["gradients"])
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < 1e-4, (worst, differences[worst])
    for ours, reference in zip(result["steps"], on_cpu, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_bf16_losses_stay_close(on_cpu: list[dict[str, Any]], tmp_path: Path) -> None:
    result = _train(tmp_path, "gpu", "bf16")
    assert result["device"] != "cpu"
    for ours, reference in zip(result["steps"], on_cpu, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-2)
