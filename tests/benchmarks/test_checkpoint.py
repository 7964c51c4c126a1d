"""benchmarks/checkpoint.py in its smallest form."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.forked_ranks import launch_forked


def test_every_figure_is_measured(tmp_path: Path) -> None:
    arguments = ("--folder", tmp_path / "run", "--output", tmp_path, "--hidden-size", "64", "--rounds", "1")
    result = launch_forked("-m", "benchmarks.checkpoint", *arguments, ranks=2, timeout=200)
    assert "| training waits, asynchronous" in result.stdout
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert len(found["ranks"]) == 2 and all(rank["share_bytes"] > 0 for rank in found["ranks"])
    assert found["async_blocked_seconds"] > 0 and found["sync_blocked_seconds"] > 0
    assert len(list((tmp_path / "run").glob("iter_*"))) >= 2
