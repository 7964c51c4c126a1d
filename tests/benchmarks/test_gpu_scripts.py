"""The scripts that `make gpu-check` runs on a GPU run on a CPU, with what a CPU has."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import torch

from tests.gpu import run_linear_layers, run_step
from tests.support.forked_ranks import launch_forked
from tests.support.launch import ROOT


def _gpu_benchmarks() -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^GPU_BENCHMARKS := (.+)$", makefile, flags=re.MULTILINE)
    with_settings: list[str] = re.findall(r"-m benchmarks\.(\w+) \$\(GPU_\w+\)", makefile)
    return str(listed).split() + with_settings


def test_every_benchmark_of_gpu_check_has_a_test_on_a_cpu() -> None:
    """One that `make test` runs."""
    names = _gpu_benchmarks()
    assert {"attention", "real_size", "memory_ladder", "feeding", "real_run", "serving"} <= set(names)
    for name in names:
        test = (ROOT / "tests" / "benchmarks" / f"test_{name}.py").read_text()
        assert f'"benchmarks.{name}"' in test and "pytest.mark.full" not in test, name


def test_gpu_check_continues_after_a_failure(tmp_path: Path) -> None:
    """So that one run prints every figure that the machine can give."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> ' + str(tmp_path / "ran") + '\ncase "$*" in *real_size*|*pytest*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", f"PY={python}", "gpu-check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    ran = (tmp_path / "ran").read_text()
    assert done.returncode and "make gpu-check: failed: tests real_size" in done.stdout
    assert re.findall(r"-m benchmarks\.(\w+)", ran) == _gpu_benchmarks()


def test_steps_of_the_test_model(tmp_path: Path) -> None:
    launch_forked(Path(run_step.__file__), tmp_path / "steps.pt", "bf16", ranks=1, timeout=120)
    result = torch.load(tmp_path / "steps.pt")
    assert result["device"] == "cpu" and len(result["steps"]) == 3


def test_losses_of_linear_layers(tmp_path: Path) -> None:
    launch_forked(Path(run_linear_layers.__file__), tmp_path / "losses.json", "3", "local", ranks=1, timeout=120)
    losses = json.loads((tmp_path / "losses.json").read_text())["local"]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_settings_of_the_kinds() -> None:
    assert run_linear_layers.settings_of("local") == {}
    assert run_linear_layers.settings_of("fp8_tensorwise") == {
        "transformer_impl": "transformer_engine", "fp8_format": "hybrid", "fp8_recipe": "tensorwise",
    }  # fmt: skip
