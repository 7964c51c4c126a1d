"""Settings of the run's length, loss and metrics through the command line, in one run on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.training.checkpoint import latest_checkpoint, load_common, read_progress
from megatron_vlm.training.checkpoint.folder import checkpoint_path
from tests.training.tiny_run import metrics, run, write_recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings")
    settings = {
        "epochs": 1.5, "rampup_batch_size": [2, 2, 5], "lr_decay_style": "WSD", "lr_warmup_iters": 1,
        "lr_wsd_decay_iters": 1, "eval_interval": 3, "eval_iters": 1, "best_metric": "eval_loss", "save_total_limit": 1,
        "loss_normalization": "sample", "log_interval": 2,
    }  # fmt: skip
    recipe = write_recipe(folder, **settings)
    folder.joinpath("out").write_text(run(recipe, folder / "save", "--valid-share", "0.3", ranks=2).stdout)
    return folder


def test_rows_per_step_grow_and_the_run_ends_after_the_epochs(work: Path) -> None:
    lines = metrics(work / "save")
    rows = [line["rows"] for line in lines]
    assert rows[:3] == [2, 2, 2] and set(rows[3:]) == {4}, "2 for rows 0 to 4, then 4"
    (summary,) = [line for line in (work / "out").read_text().splitlines() if "rows per epoch" in line]
    wanted = 1.5 * int(summary.split("rows per epoch ")[1].split(",")[0])
    assert wanted <= sum(rows) < wanted + 4
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and set(rates[1:]) == {1e-3}


def test_evaluations_are_in_the_metrics(work: Path) -> None:
    lines = metrics(work / "save")
    evaluated = [line["iteration"] for line in lines if "eval_loss" in line]
    assert evaluated == [line["iteration"] for line in lines if line["iteration"] % 3 == 0 or line is lines[-1]]
    assert lines[-1]["eval_loss"] < lines[evaluated[0] - 1]["eval_loss"]
    assert "held out 12" in (work / "out").read_text(), "0.3 of 40"


def test_the_best_weights_are_kept(work: Path) -> None:
    lines = [line for line in metrics(work / "save") if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])
    checkpoint = latest_checkpoint(work / "save" / "best")
    assert checkpoint == checkpoint_path(work / "save" / "best", best["iteration"])
    progress = read_progress(checkpoint)
    assert progress.best_metric == best["eval_loss"]
    assert load_common(checkpoint)["content_metadata"] == {"weights_only": True}
    last = latest_checkpoint(work / "save")
    assert last is not None and read_progress(last).best_metric == best["eval_loss"]


def test_metrics_of_every_iteration_are_reduced_every_log_interval(work: Path) -> None:
    lines = metrics(work / "save")
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    logged = [line for line in (work / "out").read_text().splitlines() if "| lm loss" in line]
    assert len(logged) == -(-len(lines) // 2) and " left" in logged[0] and "GEMM" in logged[0]
    for line in lines:
        phases = [line[f"{phase}_seconds"] for phase in ("data", "forward_backward", "optimizer", "evaluation")]
        assert min(phases[:3]) >= 0 and sum(phases[:3]) > 0 and line["step_seconds"] > 0
        assert (phases[3] > 0) == ("eval_loss" in line)
        assert line["device_idle_seconds"] >= 0 and line["gemm_utilization"] > 0 and line["tflops_per_device"] > 0
        due = line["iteration"] % 2 == 0 or line is lines[-1]
        assert ("grad_norm/vision" in line) == ("host_memory_gib" in line) == due
        if due:
            squares = sum(line[f"grad_norm/{part}"] ** 2 for part in ("vision", "projector", "language"))
            assert squares**0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
