"""A long run with many asynchronous saves holds no more files, threads, processes or memory at its end."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from tests.support.launch import launch
from tests.training.run_soak import ITERATIONS, LOOK_INTERVAL
from tests.training.tiny_run import metrics, write_recipe

MOST = {"files": 1.0, "threads": 1.0, "processes": 1.0, "memory": 1.02, "memory of children": 1.02}
"""The mean over the last fifth of the iterations, relative to that over the second."""


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_five_hundred_iterations_with_saves(tmp_path: Path) -> None:
    save = tmp_path / "run"
    launch("-m", "tests.training.run_soak", write_recipe(tmp_path), save, ranks=2, timeout=1400)
    assert len(metrics(save)) == ITERATIONS
    fifth = ITERATIONS // LOOK_INTERVAL // 5
    for rank in json.loads((save / "soak.json").read_text()):
        for kind, most in MOST.items():
            values = [look[kind] for look in rank]
            early, late = mean(values[fifth : 2 * fifth]), mean(values[-fifth:])
            print(f"{kind}: {early:,.1f} -> {late:,.1f}")
            assert late <= most * early + (1 if most == 1.0 else 0), (kind, values)
    assert len(list(save.glob("iter_*"))) == 2
