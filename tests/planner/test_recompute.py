"""`recompute_granularity: auto` takes the cheapest recomputation that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vlm.config import ConfigError, ParallelConfig, Recipe, check_recipe, load_recipe
from megatron_vlm.planner.devices import GB, USABLE_MEMORY
from megatron_vlm.planner.recompute import cheapest_recompute, describe_recompute, recompute_ladder
from megatron_vlm.planner.report import describe_plan

RECIPE = "examples/instellavl/instruct.yaml"


def _recipe(**training: Any) -> Recipe:
    recipe = load_recipe(RECIPE)
    settings: dict[str, Any] = {"global_batch_size": 2, "recompute_granularity": "auto", **training}
    return replace(recipe, training=replace(recipe.training, **settings))


def test_the_ladder_goes_from_nothing_to_everything() -> None:
    ladder = recompute_ladder(_recipe(), 1)
    assert [rung.work for rung in ladder] == sorted(rung.work for rung in ladder)
    assert [rung.memory for rung in ladder] == sorted((rung.memory for rung in ladder), reverse=True)
    assert describe_recompute(ladder[0].recipe) == "nothing"
    assert describe_recompute(ladder[-1].recipe) == "all language layers, the vision tower"
    for rung in ladder:
        check_recipe(rung.recipe, 1)
    steps = [high.memory - low.memory for high, low in zip(ladder, ladder[1:], strict=False)]
    assert max(steps) < 15 * GB, "every budget between the two ends has a rung"


@pytest.mark.parametrize("memory", [40, 64, 80, 141, 192])
def test_nothing_cheaper_fits(memory: int) -> None:
    rung, fits = cheapest_recompute(_recipe(), 1, memory * GB)
    assert fits and rung.memory <= USABLE_MEMORY * memory * GB
    cheaper = [other for other in recompute_ladder(_recipe(), 1) if other.work < rung.work]
    assert all(other.memory > USABLE_MEMORY * memory * GB for other in cheaper)
    assert (describe_recompute(rung.recipe) == "nothing") == (memory > 100)


def test_the_last_rung_where_none_fits() -> None:
    rung, fits = cheapest_recompute(_recipe(), 1, 20 * GB)
    assert not fits and describe_recompute(rung.recipe) == "all language layers, the vision tower"


def test_a_frozen_tower_is_not_recomputed() -> None:
    for rung in recompute_ladder(_recipe(trainable=["projector", "language"]), 1):
        assert not rung.recipe.training.recomputes_vision or "vision" not in describe_recompute(rung.recipe)


def test_the_tower_alone_on_a_stage_needs_no_language_layers() -> None:
    recipe = _recipe(global_batch_size=8)
    layout = "E|" + "|".join(["ttttt", "tttttt", "tttttL"])
    recipe.parallel = ParallelConfig(pipeline_model_parallel_size=4, pipeline_model_parallel_layout=layout)
    check_recipe(recipe, 4)
    busiest = recompute_ladder(recipe, 4)
    assert busiest[0].memory > busiest[-1].memory


def test_a_run_resolves_it(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.training import recompute_choice

    recipe = _recipe()
    monkeypatch.setattr(recompute_choice, "device_memory", lambda: 80 * GB)
    recompute_choice.resolve_recompute(recipe)
    expected = cheapest_recompute(_recipe(), 1, 80 * GB)[0].recipe
    assert recipe == expected and recipe.training.recompute_granularity != "auto"

    recipe = _recipe()
    monkeypatch.setattr(recompute_choice, "device_memory", lambda: None)
    recompute_choice.resolve_recompute(recipe)
    assert recipe.training.recompute_granularity is None and not recipe.training.recomputes_vision


def test_a_dry_run_says_what_would_be_chosen() -> None:
    lines = [line for line in describe_plan(_recipe(), 1) if line.startswith("recompute")]
    assert [line.split(":")[0] for line in lines] == [f"recompute  on {size} GB" for size in (40, 64, 80, 141, 192)]
    assert lines[-1].startswith("recompute  on 192 GB: nothing (0 % more work,")


def test_the_tower_is_not_chosen_twice() -> None:
    with pytest.raises(ConfigError, match=r"recompute_vision = True.*is chosen by recompute_granularity = auto"):
        check_recipe(_recipe(recompute_vision=True), 1)
