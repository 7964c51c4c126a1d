"""The benchmark of feeding runs, at another size, and what it compares is the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.launch import launch

SIZES = {
    "model": {
        "vision": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
            "image_size": 28, "patch_size": 14,
        },
        "language": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
        },
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    },
    "data": {"seq_length": 2048, "max_tiles_per_row": 20},
}  # fmt: skip


@pytest.mark.timeout(180)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before it measures, it compares the losses of the first row from the loader and from memory."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SIZES))
    small = ["--config", str(recipe), "--samples", "12", "--steps", "2", "--workers", "0", "1"]
    done = launch("-m", "benchmarks.feeding", *small, "--output", str(tmp_path), ranks=1, timeout=170)
    result = json.loads((tmp_path / "feeding-cpu.json").read_text())
    assert [found["name"] for found in result["passes"]] == [
        "rows in memory", "loader, 0 workers", "loader, 1 workers",
    ]  # fmt: skip
    assert all(len(found["seconds"]) == 2 and 0 <= found["waited"] < 1 for found in result["passes"])
    assert result["passes"][0]["waited"] == 0 < result["passes"][1]["waited"]
    assert "| rows in memory" in done.stdout
