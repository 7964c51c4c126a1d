"""The serving benchmark runs with a small model, and the engine generates the tokens of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.forked_ranks import launch_forked


def test_the_benchmark_runs(tmp_path: Path) -> None:
    sizes = ["--hidden-size", "64", "--num-layers", "1", "--clients", "1", "3", "--new-tokens", "5"]
    sizes += ["--prompt-tokens", "20", "90", "--baseline-prompts", "2", "--max-tokens", "32", "--threads", "1"]
    done = launch_forked("-m", "benchmarks.serving", *sizes, "--output", tmp_path, ranks=1, timeout=100)
    assert "| engine, 3 clients, 5 new tokens" in done.stdout
    runs = json.loads((tmp_path / "serving.json").read_text())["results"]["5"]
    assert list(runs) == ["transformers", "engine, 1 clients", "engine, 3 clients"]
    for figures in runs.values():
        assert figures["tokens_per_second"] > 0
        assert 0 < figures["prefill_share"] < 1
    assert len(runs["engine, 3 clients"]["first_token_seconds"]) == 6
