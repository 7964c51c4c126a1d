"""The benchmark of starting runs, and the second start reads what the first one found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import launch


@pytest.mark.full
def test_the_benchmark_runs(tmp_path: Path) -> None:
    small = ["--entries", "400", "--ranks", "2", "--output", str(tmp_path)]
    done = launch("-m", "benchmarks.start", *small, ranks=1, timeout=120)
    first, second = json.loads((tmp_path / "start.json").read_text())["starts"].values()
    assert first["usable"] == second["usable"] == 396 and first["plan"] == second["plan"]
    assert "| second start" in done.stdout
