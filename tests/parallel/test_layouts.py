"""Every parallel layout has the full gradients (before clipping) and the losses of one process, at every step.

Each world size is launched once and runs all of its layouts (run_layouts.py); the tests read the results.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.layouts import LAYOUTS, Layout
from tests.support.launch import launch

GRADIENTS = 1e-5
"""|ours - reference| / |reference|, per tensor, fp32."""
LOSSES = 1e-5
BF16 = 2e-2

SCRIPT = Path(__file__).parent / "run_layouts.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """World size -> differences of its layouts from one process; world size 1 runs first and writes the references."""
    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def of_world(world: int) -> dict[str, Any]:
        if world != 1:
            of_world(1)
        launch(SCRIPT, str(folder), ranks=world, timeout=400)
        found: dict[str, Any] = json.loads((folder / f"world_{world}.json").read_text())
        return found

    return of_world


CASES = [pytest.param(world, layout, id=f"{world}-{layout.name}") for world in LAYOUTS for layout in LAYOUTS[world]]


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_layout_equals_one_process(results: Any, world: int, layout: Layout) -> None:
    found = results(world)[layout.name]
    difference, tensor, step = found["gradient"]
    assert found["same_tokens"], "the number of supervised tokens differs, so the rows differ"
    if layout.bf16:
        assert found["loss"] < BF16 and found["grad_norm"] < BF16
        return
    assert difference < GRADIENTS, f"gradient of {tensor} at step {step} is off by {difference:.1e} of its norm"
    assert found["loss"] < LOSSES
    assert found["grad_norm"] < LOSSES, "the gradient norm, which clipping uses, differs"


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_frozen_parameters_do_not_change(results: Any, world: int, layout: Layout) -> None:
    """Bit for bit, in every layout."""
    assert results(world)[layout.name]["frozen_changed"] == 0


def test_the_comparison_finds_a_wrong_gradient(results: Any) -> None:
    """A gradient that is halved in one tensor is reported with its name."""
    difference, tensor, _ = results(2)["broken"]["gradient"]
    assert difference == pytest.approx(0.5, rel=1e-3)
    assert tensor == "projector.linear_1.weight"


def test_every_part_is_compared(results: Any) -> None:
    """All trainable tensors of the tiny model: 22 in vision tower and projector, 5 in the language model."""
    assert results(2)["tp2"]["tensors"] == 27
    assert results(2)["tp2_projector"]["tensors"] == 5
    assert results(2)["tp2_tensor_sgd_siglip-qwen2"]["tensors"] == 29, "20 and 9"
