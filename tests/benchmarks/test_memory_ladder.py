"""The memory ladder is printed for the real model on a CPU, and measured with a small one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory_ladder import Line, Measured, limited_to, shape_of, spread
from benchmarks.real_size import Workload
from megatron_vlm.planner.recompute import Rung
from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


def _run(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    done = launch_forked("-m", "benchmarks.memory_ladder", *arguments, "--output", tmp_path, ranks=1, timeout=120)
    return done.stdout, json.loads((tmp_path / "memory_ladder-cpu.json").read_text())


def test_the_real_model_is_estimated(tmp_path: Path) -> None:
    printed, found = _run(tmp_path, "--rows", "1")
    sizes = [rung["predicted_bytes"] / 2**30 for rung in found["rungs"]]
    assert len(sizes) > 20 and 80 < sizes[0] < 100 and 28 < sizes[-1] < 36, "measured: 90 and 32"
    assert [rung["measured"] for rung in found["rungs"]] == [None] * len(sizes)
    assert [budget["fits"] for budget in found["budgets"]] == ["predicted"] * 5
    assert [budget["recomputed"] for budget in found["budgets"]][-2:] == ["nothing"] * 2
    assert "| all language layers, the vision tower" in printed
    assert "| 1 language layer of each stage " in printed


def test_every_rung_of_a_small_model_trains(tmp_path: Path) -> None:
    """All rungs must have the same loss."""
    grids = [[28 * w, 28 * h] for w, h in [(1, 1), (2, 2), *[(n, 1) for n in range(2, 6)]]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=16384, max_tiles=80, grids=grids)
    printed, found = _run(tmp_path, "--config", str(recipe), "--measure", "--rounds", "1", "--budgets", "80")
    assert len(found["rungs"]) > 3
    assert all(rung["measured"]["seconds"][0] > 0 for rung in found["rungs"])
    assert "| nothing " in printed and found["budgets"][0]["measured"] is None


def test_the_planners_error_is_relative_to_what_was_measured() -> None:
    rung = Rung(None, 1.0, 0)  # type: ignore[arg-type]
    assert Line(rung, 110, Measured("", [1.0], 100, 0.0)).error == pytest.approx(0.1)
    assert Line(rung, 110, Measured("", [], 0, 0.0, "out of memory")).error is None
    assert Line(rung, 110, None).error is None


def test_torch_is_limited_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 141

    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(RuntimeError), limited_to(47):
        raise RuntimeError
    assert fractions == [pytest.approx(1 / 3), 1.0]


def test_the_row_with_most_tiles_counts() -> None:
    class Row:
        def __init__(self, tiles: int) -> None:
            self.num_tiles, self.labels = tiles, torch.tensor([-100, 5, -100, 7])

    work = Workload([["ab", "c"], ["abc", "d"]], [Row(3), Row(8)], [])  # type: ignore[list-item]
    assert vars(shape_of(work)) == {
        "tokens": 4, "tiles": 8, "document_tokens": 2.5, "supervised_tokens": 2,
    }  # fmt: skip


def test_some_rungs_at_equal_distances() -> None:
    ladder = [Rung(None, work, 0) for work in range(24)]  # type: ignore[arg-type]
    assert [rung.work for rung in spread(ladder, 4)] == [0, 8, 15, 23]
    assert spread(ladder, 24) == spread(ladder, 40) == spread(ladder, None) == ladder
