"""Each check of the model's sizes, on its own."""

from __future__ import annotations

import pytest

TENSOR = {"parallel.tensor_model_parallel_size": 4}
PIPELINE = {"parallel.pipeline_model_parallel_size": 2}
LAYOUT = "parallel.pipeline_model_parallel_layout"
CASES = [
    ({"model.vision.hidden_size": 34}, 1, "model.vision.hidden_size = 34", "Use 32 or 36"),
    ({"model.vision.patch_size": 5}, 1, "model.vision.image_size = 28", "Use 25 or 30"),
    ({"model.vision.vision_feature_layer": 1}, 1, "model.vision.vision_feature_layer = 1", "from -4 to -1"),
    ({"model.vision.vision_feature_layer": 0}, 1, "model.vision.vision_feature_layer = 0", "from -4 to -1"),
    ({"model.vision.vision_feature_layer": -5}, 1, "model.vision.vision_feature_layer = -5", "from -4 to -1"),
    (
        TENSOR
        | {
            "model.vision.num_attention_heads": 2,
            "parallel.vision_parallel": "tensor",
        },
        4,
        "model.vision.num_attention_heads = 2",
        "1 or 2, or vision_parallel = data",
    ),
    (
        TENSOR | {"model.vision.intermediate_size": 66, "parallel.vision_parallel": "tensor"},
        4,
        "model.vision.intermediate_size = 66",
        "1, 2 or 3, or vision_parallel = data",
    ),
    ({"model.image_grid_pinpoints": []}, 1, "model.image_grid_pinpoints = nothing", "[[28, 28]]"),
    ({"model.image_grid_pinpoints": [[28, 28], [28]]}, 1, "model.image_grid_pinpoints = [28]", "[width, height]"),
    ({"model.image_grid_pinpoints": [[28, 30]]}, 1, "model.image_grid_pinpoints = [28, 30]", "[28, 56]"),
    ({"model.image_grid_pinpoints": [[0, 28]]}, 1, "model.image_grid_pinpoints = [0, 28]", "[28, 56]"),
    ({"model.language.hidden_size": 68}, 1, "model.language.hidden_size = 68", "Use 64 or 72"),
    ({"model.language.hidden_size": 72}, 1, "model.language.hidden_size = 72", "Use 64 or 80"),
    ({"model.language.num_key_value_heads": 3}, 1, "model.language.num_key_value_heads = 3", "Use 1, 2, 4 or 8"),
    (
        {"parallel.tensor_model_parallel_size": 4, "parallel.context_parallel_size": 4},
        16,
        "model.language.num_attention_heads = 8",
        "1, 2, 4 or 8",
    ),
    (
        # 12 query heads and 6 key and value heads over 4 ranks: neither sharded nor replicated evenly
        {
            "model.language.num_attention_heads": 12,
            "model.language.hidden_size": 96,
            "model.language.num_key_value_heads": 6,
            "parallel.tensor_model_parallel_size": 2,
            "parallel.context_parallel_size": 2,
        },
        4,
        "model.language.num_key_value_heads = 6",
        "divide 6 or are multiples of it",
    ),
    (
        # 6 heads can be replicated over TP * CP = 12 ranks, but not over TP = 4
        {
            "model.language.num_attention_heads": 12,
            "model.language.hidden_size": 96,
            "model.language.num_key_value_heads": 6,
            "parallel.tensor_model_parallel_size": 4,
            "parallel.context_parallel_size": 3,
            "data.seq_length": 120,
        },
        12,
        "model.language.num_key_value_heads = 6",
        "divide 6 or are multiples of it",
    ),
    (
        # one key and one value head of size 6 cannot be sharded over 8 ranks
        {
            "model.language.num_key_value_heads": 1,
            "model.language.head_dim": 6,
            "parallel.tensor_model_parallel_size": 8,
        },
        8,
        "model.language.num_key_value_heads = 1",
        "1, 2 or 4",
    ),
    (TENSOR | {"model.language.intermediate_size": 130}, 4, "model.language.intermediate_size = 130", "1 or 2"),
    (TENSOR | {"model.language.vocab_size": 510}, 4, "model.language.vocab_size = 510", "to 512, or"),
    ({"model.image_token_index": 512}, 1, "model.image_token_index = 512", "from 0 to 511"),
    ({"model.image_token_index": -1}, 1, "model.image_token_index = -1", "from 0 to 511"),
    ({"parallel.pipeline_model_parallel_size": 3}, 3, "model.language.num_hidden_layers = 4", "layout = auto"),
    (PIPELINE | {LAYOUT: "Et*2|t*2"}, 2, f"{LAYOUT} = Et*2|t*2", "at its end. Use auto, or for example Et*2|t*2L"),
    (PIPELINE | {LAYOUT: "Et*2|x*2L"}, 2, f"{LAYOUT} = Et*2|x*2L", "has x, which is none of E, t, L"),
    (
        PIPELINE | {LAYOUT: "Et*2|tL"},
        2,
        f"{LAYOUT} = Et*2|tL",
        "3 language layers, but model.language.num_hidden_layers = 4. Use",
    ),
    (
        PIPELINE | {LAYOUT: "Et|t|t*2L"},
        2,
        f"{LAYOUT} = Et|t|t*2L",
        "3 stages, but pipeline_model_parallel_size = 2. Use auto",
    ),
    ({LAYOUT: "Et*2|t*2L"}, 1, f"{LAYOUT} = Et*2|t*2L", "2 stages, but pipeline_model_parallel_size = 1. Use auto"),
    (
        {"parallel.pipeline_model_parallel_size": 4, LAYOUT: "Et*2||t|tL"},
        4,
        f"{LAYOUT} = Et*2||t|tL",
        "has no layer on stage 1; only the first and the last one may be without. Use auto, or for example Et|t|t|tL",
    ),
    ({"parallel.pipeline_model_parallel_size": 6, LAYOUT: "auto"}, 6, f"{LAYOUT} = auto", "at most 5"),
    (
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 4},
        2,
        "model.language.num_hidden_layers = 4",
        "Make that product 1, 2 or 4",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "setting", "remedy"), CASES, ids=[case[2] for case in CASES])
def test_one_problem_with_setting_value_and_remedy(problems_of, changes, world_size, setting, remedy):
    (problem,) = problems_of(changes, world_size)
    assert problem.startswith(setting + ":")
    assert remedy in problem


def test_a_replicated_vision_tower_may_have_any_number_of_heads(problems_of):
    changes = TENSOR | {"model.vision.num_attention_heads": 2, "model.vision.intermediate_size": 66}
    assert problems_of(changes, 4) == []


@pytest.mark.parametrize("key_value_heads", [1, 2, 4, 8])
def test_key_value_heads_may_be_fewer_than_ranks(problems_of, key_value_heads):
    changes = {
        "model.language.num_key_value_heads": key_value_heads,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.context_parallel_size": 4,
    }
    assert problems_of(changes, 8) == []


@pytest.mark.parametrize(
    "changes",
    [{"model.vision.vision_feature_layer": -4}, {"model.image_token_index": 0}, {"model.image_token_index": 511}],
)
def test_the_limits_of_ranges_are_allowed(problems_of, changes):
    assert problems_of(changes) == []
