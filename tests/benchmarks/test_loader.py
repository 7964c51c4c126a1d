"""The loader benchmark runs, and all loaders make the same tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import launch


@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before timing, the benchmark compares tiles; after each pass it counts them."""
    small = ["--samples", "12", "--rounds", "1", "--workers", "0", "2", "--output", str(tmp_path)]
    done = launch("-m", "benchmarks.loader", *small, ranks=1, timeout=170)
    result = json.loads((tmp_path / "loader.json").read_text())
    assert result["difference_to_transformers"] < 1e-3
    assert [(loader["name"], loader["workers"]) for loader in result["loaders"]][:2] == [
        ("bare loop", 0), ("megatron-vlm", 0),
    ]  # fmt: skip
    assert len(result["loaders"]) == 8
    assert all(loader["cpu_relative_to_bare_loop"] > 0 for loader in result["loaders"])
    assert result["images"] <= result["samples"] == 12
    assert "| megatron-vlm" in done.stdout
