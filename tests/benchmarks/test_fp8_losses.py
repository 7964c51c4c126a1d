"""The comparison of FP8 with bf16 runs with a small model; a CPU has one kind of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fp8_losses import largest_difference
from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


@pytest.mark.timeout(900)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    grids = [[28, 56], [56, 28], [56, 56]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids)
    small = ["--config", str(recipe), "--samples", "8", "--steps", "3", "--workers", "1", "--output", str(tmp_path)]
    done = launch_forked("-m", "benchmarks.fp8_losses", *small, ranks=1, timeout=280)
    (run,) = json.loads((tmp_path / "fp8_losses-cpu.json").read_text())["runs"]
    assert len(run["losses"]) == 3 and run["largest_difference"] == 0
    assert done.stdout.count("| cannot run here |") == 3


def test_differences_are_those_of_averages() -> None:
    reference = [4.0] * 60
    noisy = [4.0 + (0.4 if number % 2 else -0.4) for number in range(60)]
    assert largest_difference(noisy, reference) < 1e-6
    assert largest_difference([*reference[:40], *[4.4] * 20], reference) == pytest.approx(0.1)
