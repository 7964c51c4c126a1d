"""The command line on a GPU: worker processes, pinned memory, checkpoints, and resuming on either device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.tiny_run import metrics, run, write_recipe

pytestmark = pytest.mark.gpu
FP32 = 1e-4


def _stop_after(saved: Path, stopped: Path, iteration: int) -> Path:
    shutil.copytree(saved, stopped)
    (stopped / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return stopped


def _losses(save: Path) -> list[float]:
    return [line["lm_loss"] for line in metrics(save)]


def test_runs_cross_between_gpu_and_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, save_interval=3)
    run(recipe, tmp_path / "gpu", "--num-workers", "2")
    with monkeypatch.context() as patch:
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            patch.setenv(name, "")
        run(recipe, tmp_path / "cpu")
        run(recipe, _stop_after(tmp_path / "gpu", tmp_path / "gpu_then_cpu", 3))
    run(recipe, _stop_after(tmp_path / "cpu", tmp_path / "cpu_then_gpu", 3))
    expected = _losses(tmp_path / "cpu")
    assert len(expected) == 6
    for name in ("gpu", "gpu_then_cpu", "cpu_then_gpu"):
        assert _losses(tmp_path / name) == pytest.approx(expected, rel=FP32), name


def test_bf16_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """Checkpoints hold master weights and moments: a resumed run has the losses of the uninterrupted one."""
    recipe = write_recipe(tmp_path, save_interval=3, bf16=True)
    run(recipe, tmp_path / "whole")
    run(recipe, _stop_after(tmp_path / "whole", tmp_path / "stopped", 3))
    assert _losses(tmp_path / "stopped") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-3)
    run(recipe, tmp_path / "recomputed", "--recompute-granularity", "full")
    assert _losses(tmp_path / "recomputed") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-3)
