"""The benchmark of feeding runs, at another size, and what it compares is the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.launch import launch


@pytest.mark.timeout(180)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before it measures, it compares the losses of the first row from the loader and from memory."""
    grids = [[28, 56], [56, 28], [56, 56]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids)
    small = ["--config", str(recipe), "--samples", "12", "--steps", "2", "--workers", "0", "1"]
    done = launch("-m", "benchmarks.feeding", *small, "--output", str(tmp_path), ranks=1, timeout=170)
    result = json.loads((tmp_path / "feeding-cpu.json").read_text())
    assert [found["name"] for found in result["passes"]] == [
        "rows in memory", "loader, 0 workers", "loader, 1 workers",
    ]  # fmt: skip
    assert all(len(found["seconds"]) == 2 and 0 <= found["waited"] < 1 for found in result["passes"])
    assert result["passes"][0]["waited"] == 0 < result["passes"][1]["waited"]
    assert "| rows in memory" in done.stdout
