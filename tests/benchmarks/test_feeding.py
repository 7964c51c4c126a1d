"""The feeding benchmark runs with a small model, and the loader gives the same rows as those in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before timing, the benchmark compares the first row's losses from the loader and from memory."""
    grids = [[28, 56], [56, 28], [56, 56]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids)
    small = ["--config", str(recipe), "--samples", "12", "--steps", "2", "--workers", "0", "1"]
    done = launch_forked("-m", "benchmarks.feeding", *small, "--output", str(tmp_path), ranks=1, timeout=170)
    result = json.loads((tmp_path / "feeding-cpu.json").read_text())
    assert [measured["name"] for measured in result["passes"]] == [
        "rows in memory", "loader, 0 workers", "loader, 1 workers",
    ]  # fmt: skip
    assert all(
        len(measured["seconds"]) == 2 and 0 <= measured["data_wait_fraction"] < 1 for measured in result["passes"]
    )
    assert result["passes"][0]["data_wait_fraction"] == 0 < result["passes"][1]["data_wait_fraction"]
    assert "| rows in memory" in done.stdout
