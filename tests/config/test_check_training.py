"""Each check of batch size, world size and optimizer, on its own."""

from __future__ import annotations

import pytest

INTERLEAVED = {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2}
CASES = [
    (
        {"parallel.tensor_model_parallel_size": 2, "parallel.context_parallel_size": 2, "data.seq_length": 126},
        4,
        "data.seq_length = 126",
        "Use 124 or 128",
    ),
    (
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        1,
        "parallel.virtual_pipeline_model_parallel_size = 2",
        "pipeline_model_parallel_size of 2 or more",
    ),
    ({"parallel.context_parallel_size": 2}, 3, "world size = 3", "Start 2 or 4 processes"),
    ({"parallel.context_parallel_size": 2}, 1, "world size = 1", "Start 2 processes"),
    ({}, 3, "training.global_batch_size = 8", "Use 6 or 9 rows, or 1 or 2 data-parallel ranks"),
    (INTERLEAVED | {"training.global_batch_size": 6}, 4, "training.global_batch_size = 6", "Use 4 or 8 rows"),
    (
        {"training.trainable": ["language", "language_lora"]},
        1,
        "training.trainable = ['language', 'language_lora']",
        "Leave out language or language_lora",
    ),
    ({"training.optimizer": "sgd"}, 1, "training.optimizer = sgd", "use_distributed_optimizer = false"),
    (
        {
            "parallel.overlap_param_gather": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.use_distributed_optimizer": False,
        },
        1,
        "parallel.overlap_param_gather = True",
        "Set use_distributed_optimizer = true",
    ),
    (
        {"parallel.num_distributed_optimizer_instances": 2, "parallel.use_distributed_optimizer": False},
        2,
        "parallel.num_distributed_optimizer_instances = 2",
        "Set use_distributed_optimizer = true",
    ),
    (
        {"parallel.num_distributed_optimizer_instances": 3, "parallel.context_parallel_size": 2},
        4,
        "parallel.num_distributed_optimizer_instances = 3",
        "Use 1 or 2",
    ),
    (
        {"parallel.overlap_param_gather": True},
        1,
        "parallel.overlap_param_gather = True",
        "Set overlap_grad_reduce = true",
    ),
    (
        {"training.recompute_modules": ["mlp"]},
        1,
        "training.recompute_modules = ['mlp']",
        "Set recompute_granularity = selective, or leave recompute_modules out",
    ),
    (
        {"training.recompute_num_layers": 2, "training.recompute_granularity": "selective"},
        1,
        "training.recompute_num_layers = 2",
        "Set recompute_granularity = full",
    ),
    ({"training.min_lr": 1e-3, "training.lr": 1e-4}, 1, "training.min_lr = 0.001", "at most 0.0001"),
    (
        {"training.min_lr": 1e-5, "training.lr": 1e-4, "training.vision_lr": 2e-6},
        1,
        "training.min_lr = 1e-05",
        "at most 2e-06",
    ),
    (
        {"training.min_lr": 1e-5, "training.lr": 1e-4, "training.projector_lr": 3e-6},
        1,
        "training.min_lr = 1e-05",
        "at most 3e-06",
    ),
]


def test_rows_may_be_longer_than_the_context(problems_of):
    """Positions restart in each document of a row."""
    assert problems_of({"data.seq_length": 512}, 1) == []


@pytest.mark.parametrize(("changes", "world_size", "setting", "remedy"), CASES)
def test_one_problem_with_setting_value_and_remedy(problems_of, changes, world_size, setting, remedy):
    (problem,) = problems_of(changes, world_size)
    assert problem.startswith(setting + ":")
    assert remedy in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"training.optimizer": "sgd", "parallel.use_distributed_optimizer": False},
        {"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True},
        {"training.min_lr": 1e-4, "training.lr": 1e-4},
    ],
)
def test_valid_combinations_pass(problems_of, changes):
    assert problems_of(changes) == []


def test_without_interleaving_micro_batches_need_not_be_a_multiple_of_stages(problems_of):
    changes = {"parallel.pipeline_model_parallel_size": 4, "training.global_batch_size": 6}
    assert problems_of(changes, 8) == []
