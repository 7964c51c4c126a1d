"""The benchmark of the loader runs, and what it compares is the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import launch


@pytest.mark.timeout(180)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before it measures anything it compares tiles, and after each pass it counts them."""
    small = ["--samples", "12", "--rounds", "1", "--workers", "0", "2", "--output", str(tmp_path)]
    done = launch("-m", "benchmarks.loader", *small, ranks=1, timeout=170)
    result = json.loads((tmp_path / "loader.json").read_text())
    assert result["difference_to_transformers"] < 1e-3
    assert [(found["name"], found["workers"]) for found in result["loaders"]][:2] == [
        ("pure limit", 0), ("megatron-vlm", 0),
    ]  # fmt: skip
    assert len(result["loaders"]) == 8
    assert all(found["cpu_against_limit"] > 0 for found in result["loaders"])
    assert result["images"] <= result["samples"] == 12
    assert "| megatron-vlm" in done.stdout
