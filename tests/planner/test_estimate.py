"""Estimates against what one GPU measured, and the search among layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.commands import plan_layout
from megatron_vlm.config import Recipe, check_recipe, load_recipe
from megatron_vlm.planner.devices import DEVICES
from megatron_vlm.planner.estimate import Estimate, estimate
from megatron_vlm.planner.parameters import model_parameters
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.planner.search import best_layouts

RESULTS = Path("benchmarks/results")
RECIPE = "examples/instellavl/instruct.yaml"
MEMORY, TIME = 0.10, 0.10
"""|estimated / measured - 1|"""
CASES = [
    ("H200", "real_size-nvidia-h200.json", "megatron-vlm, packed", None),
    ("H200", "real_size-nvidia-h200.json", "megatron-vlm, packed, full recompute", "full"),
    ("H100", "real_size-nvidia-h100-80gb-hbm3.json", "megatron-vlm, packed, full recompute", "full"),
]


def _recipe(**training: Any) -> Recipe:
    recipe = load_recipe(RECIPE)
    return replace(recipe, training=replace(recipe.training, **training))


@pytest.mark.parametrize(("device", "file", "loop", "recompute"), CASES, ids=lambda value: str(value))
def test_one_gpu_at_the_real_size(device: str, file: str, loop: str, recompute: str | None) -> None:
    measured = json.loads((RESULTS / file).read_text())
    (found,) = [one for one in measured["loops"] if one["name"] == loop]
    rows = len(found["seconds"])
    shape = RowShape(
        measured["seq_length"], measured["tiles"] / rows, measured["tokens"] / measured["samples"],
        measured["seq_length"] / 8,
    )  # fmt: skip
    planned = estimate(_recipe(recompute_granularity=recompute, global_batch_size=1), 1, DEVICES[device], shape)
    assert planned.memory.total == pytest.approx(found["peak_bytes"], rel=MEMORY)
    assert planned.step_seconds == pytest.approx(sorted(found["seconds"])[rows // 2], rel=TIME)


def test_without_recomputation_the_real_size_does_not_fit_on_80_gb() -> None:
    """benchmarks/real_size.py ran out of memory there."""
    recipe = _recipe(recompute_granularity=None, global_batch_size=1)
    shape = RowShape.of_recipe(recipe)
    assert not estimate(recipe, 1, DEVICES["H100"], shape).fits(DEVICES["H100"])
    assert estimate(recipe, 1, DEVICES["H200"], shape).fits(DEVICES["H200"])


def test_peaks_are_those_that_runs_report() -> None:
    from megatron_vlm.runtime.peak_rate import datasheet_peak

    for name, device in DEVICES.items():
        assert device.peak == pytest.approx(datasheet_peak(name), rel=1e-3)


def test_parameters_of_the_published_model() -> None:
    parameters = model_parameters(load_recipe(RECIPE).model)
    assert parameters["language"] == 1_176_764_416, "AMD-OLMo-1B"
    assert sum(parameters.values()) == pytest.approx(1.47e9, rel=0.01)


@pytest.fixture(scope="module")
def found() -> list[Estimate]:
    recipe = _recipe()
    return best_layouts(recipe, 8, DEVICES["H100"], RowShape.of_recipe(recipe))


def test_layouts_fit_are_valid_and_the_fastest_is_first(found: list[Estimate]) -> None:
    assert len(found) > 20
    for one in found:
        check_recipe(one.recipe, 8)
        assert one.fits(DEVICES["H100"]) and 0 < one.mfu < 0.6 and 0 <= one.bubble < 1
    assert [round(one.step_seconds, 4) for one in found] == sorted(round(one.step_seconds, 4) for one in found)


def test_more_memory_allows_no_slower_layout(found: list[Estimate]) -> None:
    recipe = _recipe()
    roomy = best_layouts(recipe, 8, replace(DEVICES["H100"], memory=200e9), RowShape.of_recipe(recipe))
    assert roomy[0].step_seconds <= found[0].step_seconds and len(roomy) > len(found)


def test_command_lists_the_fastest(capsys: pytest.CaptureFixture[str], found: list[Estimate]) -> None:
    assert plan_layout.main(["--gpus", "8", "--device", "H100", "--top", "3", "--config", RECIPE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model      1.474 B parameters")
    assert f"{len(found)} fit on 8 x H100" in lines[2]
    assert lines[3].split()[:5] == ["TP", "CP", "PP", "VPP", "DP"] and len(lines) == 7
    assert f"{found[0].step_seconds:.2f}" in lines[4]


def test_command_says_what_to_do_if_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_layout.main(["--gpus", "1", "--memory-gb", "20", "--config", RECIPE, "--global-batch-size", "1"]) == 1
    assert "no layout fits into 92% of 20 GB on 1 GPUs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        plan_layout.main(["--gpus", "0", "--config", RECIPE])
    assert "--gpus: '0': expected a whole number of at least 1" in capsys.readouterr().err
