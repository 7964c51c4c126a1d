"""Valid parallel layouts pass, and all problems are in one report."""

from __future__ import annotations

import pytest

from megatron_vlm.config import ConfigError, Recipe, check_paths, check_recipe

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"


def test_the_defaults_are_valid_on_one_process_and_on_eight():
    check_recipe(Recipe(), world_size=1)
    check_recipe(Recipe(), world_size=8)


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({TENSOR: 2}, 2),
        ({PIPELINE: 2}, 2),
        ({CONTEXT: 2}, 2),
        ({}, 2),
        ({TENSOR: 2, PIPELINE: 2, CONTEXT: 2}, 8),
        ({PIPELINE: 2, VIRTUAL: 2, CONTEXT: 2}, 8),
        ({TENSOR: 4, "parallel.vision_parallel": "tensor"}, 8),
    ],
)
def test_valid_layouts_have_no_problem(problems_of, sizes, world_size):
    assert problems_of(sizes, world_size) == []


def test_all_problems_are_in_one_report_and_numbered(small_recipe):
    recipe = small_recipe({TENSOR: 3, "training.lr": 0, "training.global_batch_size": 0})
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe, world_size=8)
    report = str(caught.value)
    expected = [
        "training.lr = 0.0",
        "training.global_batch_size = 0",
        "model.language.num_attention_heads = 8",
        "model.language.intermediate_size = 128",
        "model.language.vocab_size = 512",
        "data.seq_length = 128",
        "world size = 8",
    ]
    assert f"{len(expected)} problems" in report
    for setting in expected:
        assert setting in report
    numbered = [line for line in report.splitlines() if line.lstrip()[0].isdigit() and line.startswith("  ")]
    assert [line.split(".")[0].strip() for line in numbered] == [str(n + 1) for n in range(len(expected))]


def test_paths_are_checked_only_on_request_and_in_the_same_report(small_recipe):
    recipe = small_recipe({"training.lr": 0})
    with pytest.raises(ConfigError) as without_paths:
        check_recipe(recipe, world_size=1)
    with pytest.raises(ConfigError) as with_paths:
        check_recipe(recipe, world_size=1, paths=True)
    with pytest.raises(ConfigError) as paths_alone:
        check_paths(recipe)
    assert with_paths.value.problems == without_paths.value.problems + paths_alone.value.problems


def test_sizes_of_zero_are_reported_without_a_division_by_zero(problems_of):
    for key in (TENSOR, PIPELINE, VIRTUAL, CONTEXT):
        assert len(problems_of({key: 0})) == 1, key
