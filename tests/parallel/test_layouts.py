"""Every parallel layout has the full gradients (before clipping) and the losses of one process, at every step.

Each world size is launched once and runs all of its layouts (run_layouts.py); the tests read the results.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.layouts import FULL_LAYOUTS, LAYOUTS, Layout
from tests.support.forked_ranks import launch_forked

GRADIENTS = 1e-5
"""|ours - reference| / |reference|, per tensor, fp32."""
LOSSES = 1e-5
BF16 = 2e-2

SCRIPT = Path(__file__).parent / "run_layouts.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """World size -> differences of its layouts from one process; world size 1 runs first and writes the references."""
    folders = {selection: tmp_path_factory.mktemp("layouts") for selection in ("", "--full")}

    @cache
    def run_world(world: int, selection: str) -> dict[str, Any]:
        if world != 1:
            run_world(1, selection)
        folder = folders[selection]
        launch_forked(SCRIPT, str(folder), *filter(None, [selection]), ranks=world, timeout=400)
        found: dict[str, Any] = json.loads((folder / f"world_{world}.json").read_text())
        return found

    # `cache` takes a default that is given and one that is not for two calls: it would run everything twice
    return lambda world, selection="": run_world(world, selection)


CASES = [
    pytest.param(world, layout, selection, id=f"{world}-{layout.name}", marks=[pytest.mark.full] if selection else [])
    for selection, layouts in (("", LAYOUTS), ("--full", FULL_LAYOUTS))
    for world in layouts
    for layout in layouts[world]
]


@pytest.mark.parametrize(("world", "layout", "selection"), CASES)
def test_layout_equals_one_process(results: Any, world: int, layout: Layout, selection: str) -> None:
    found = results(world, selection)[layout.name]
    difference, tensor, step = found["gradient"]
    assert found["same_tokens"], "the number of supervised tokens differs, so the rows differ"
    if layout.bf16:
        assert found["loss"] < BF16 and found["grad_norm"] < BF16
        return
    assert difference < GRADIENTS, f"gradient of {tensor} at step {step} is off by {difference:.1e} of its norm"
    assert found["loss"] < LOSSES
    assert found["part_norms"] < LOSSES, "norms by model part, and the norm that they add up to"
    assert found["evaluation"] < LOSSES, "losses of the two datasets, of weights that every rank must have"
    assert found["grad_norm"] < LOSSES, "the gradient norm, which clipping uses, differs"


@pytest.mark.parametrize(("world", "layout", "selection"), CASES)
def test_frozen_parameters_do_not_change(results: Any, world: int, layout: Layout, selection: str) -> None:
    """Bit for bit, in every layout."""
    assert results(world, selection)[layout.name]["frozen_changed"] == 0


@pytest.mark.full
def test_layouts_with_small_buckets_have_several(results: Any) -> None:
    """With one bucket per model, as the tiny model has by default, no reduction overlaps with another layer's work."""
    assert results(2)["dp_overlap"]["buckets"] == 1
    for world, layouts in FULL_LAYOUTS.items():
        for layout in layouts:
            assert not layout.buckets or results(world, "--full")[layout.name]["buckets"] > 3


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
