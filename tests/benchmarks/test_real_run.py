"""The benchmark of the real command runs with a small model; command and rows in memory have the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.feeding import CONFIG, recipe_of_shards
from benchmarks.real_run import Run, busy_fraction, check_same_losses
from megatron_vlm.config.recipe import load_recipe
from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


@pytest.mark.timeout(900)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    grids = [[28, 56], [56, 28], [56, 56]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids)
    small = ["--config", str(recipe), "--samples", "12", "--steps", "3", "--warmup", "1", "--workers", "1"]
    done = launch_forked("-m", "benchmarks.real_run", *small, "--output", str(tmp_path), ranks=1, timeout=280)
    result = json.loads((tmp_path / "real_run-cpu.json").read_text())
    assert len(result["command_seconds"]) == len(result["memory_seconds"]) == 3
    assert result["device_idle"] is None
    assert "python -m megatron_vlm.train" in done.stdout and "device idle: not measured on a CPU" in done.stdout


def test_the_reference_recipe_needs_no_files(tmp_path: Path) -> None:
    """Its weights are random: the checkpoint that it starts from is not on the machine that is measured."""
    recipe = recipe_of_shards(CONFIG, tmp_path, samples=2)
    assert load_recipe(CONFIG).training.pretrained_checkpoint and recipe.training.pretrained_checkpoint is None
    assert recipe.training.save is None and recipe.training.load is None


def test_overlapping_kernels_count_once() -> None:
    assert busy_fraction([(0, 2), (1, 3), (5, 6), (5, 6), (9, 10)]) == pytest.approx(0.5)


def test_other_losses_end_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="iteration 2"):
        check_same_losses(Run([], [4.0, 3.0]), Run([], [4.0, 3.1]), bf16=False)
