"""The layers of each stage."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_vlm.config import Recipe, load_recipe
from megatron_vlm.config.pipeline_layout import format_layout
from megatron_vlm.planner.balance import balanced_stages, layers_per_stage, stage_work
from megatron_vlm.planner.row_work import RowShape, RowWork, row_work


def _recipe(stages: int, layout: str | None, **settings: object) -> Recipe:
    recipe = load_recipe("examples/instellavl/instruct.yaml")
    recipe.parallel.pipeline_model_parallel_size = stages
    recipe.parallel.pipeline_model_parallel_layout = layout
    for name, value in settings.items():
        setattr(recipe.training, name, value)
    return recipe


def _busiest(layers: list[int], work: RowWork) -> float:
    return max([work.tower + layers[0] * work.layer, *(n * work.layer for n in layers[1:-1]),
                layers[-1] * work.layer + work.head])  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_a_less_busy_stage(seed: int) -> None:
    """Against all splits of a few layers, for random costs of tower and head."""
    random.seed(seed)
    layers, ranks = random.randint(4, 9), random.randint(2, 4)
    work = RowWork(tower=random.uniform(0, 8), layer=1.0, head=random.uniform(0, 4))
    best = min(
        _busiest(list(split), work)
        for split in itertools.product(range(layers + 1), repeat=ranks)
        if sum(split) == layers and all(split[1:-1])
    )
    chosen = balanced_stages(work, layers, ranks, 1)
    assert sum(chosen) == layers and _busiest(chosen, work) == best


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (4, 2), (2, 4), (3, 3)])
def test_virtual_stages_keep_the_layers_and_balance_the_ranks(ranks: int, chunks: int) -> None:
    work = RowWork(tower=3.3, layer=1.0, head=0.4)
    chosen = balanced_stages(work, 24, ranks, chunks)
    assert sum(chosen) == 24 and len(chosen) == ranks * chunks and all(chosen[1:-1])
    alone = balanced_stages(work, 24, ranks, 1)
    assert [sum(chosen[rank::ranks]) for rank in range(ranks)] == alone


def test_published_model_at_four_stages() -> None:
    """Equal stages wait for the first one 39 % of the time, balanced ones 6 %."""
    equal, auto = _recipe(4, None), _recipe(4, "auto")
    assert layers_per_stage(equal) == [4, 4, 4, 4]
    efficiency = {}
    for recipe in (equal, auto):
        work = stage_work(recipe, layers_per_stage(recipe))
        efficiency[recipe.parallel.pipeline_model_parallel_layout] = sum(work) / len(work) / max(work)
    assert format_layout(layers_per_stage(auto)) == "Et|t*5|t*5|t*5L"
    assert efficiency[None] == pytest.approx(0.61, abs=0.01) and efficiency["auto"] > 0.94


def test_frozen_tower_is_cheaper() -> None:
    trained, frozen = (row_work(_recipe(4, None, trainable=parts)) for parts in (["vision", "language"], ["language"]))
    assert frozen.tower < 0.3 * trained.tower and frozen.layer == trained.layer


def test_measured_costs_take_the_place_of_counted_ones() -> None:
    recipe = _recipe(4, "auto")
    recipe.data.cost_per_tile = 0.0
    assert layers_per_stage(recipe) == [4, 4, 4, 4]


def test_rows_are_as_full_of_images_as_their_budgets_allow() -> None:
    recipe = _recipe(1, None)
    assert RowShape.of_recipe(recipe).tiles == 32768 // 576
    recipe.data.max_tiles_per_row = 20
    assert RowShape.of_recipe(recipe).tiles == 20
