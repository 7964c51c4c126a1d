"""Checks of warmup, final decay and ramp-up."""

from __future__ import annotations

import pytest

CASES = [
    ({"training.train_iters": 10, "training.lr_warmup_iters": 10}, 1, "lr_warmup_iters = 10", "at most 9"),
    (
        {"training.train_iters": 10, "training.lr_decay_style": "WSD", "training.lr_warmup_iters": 4,
         "training.lr_wsd_decay_iters": 7},
        1, "lr_wsd_decay_iters = 7", "at most 6",
    ),
    ({"training.rampup_batch_size": [2, 2]}, 1, "rampup_batch_size = [2, 2]", "Give START INCREMENT ROWS"),
    ({"training.rampup_batch_size": [8, 2, 9]}, 1, "rampup_batch_size = [8, 2, 9]", "divides the difference"),
    ({"training.rampup_batch_size": [2, 4, 9]}, 1, "rampup_batch_size = [2, 4, 9]", "divides the difference"),
    ({"training.rampup_batch_size": [2, 2, 9]}, 4, "rampup_batch_size = [2, 2, 9]", "Use multiples of 4"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "world_size", "setting", "remedy"), CASES)
def test_one_problem_with_setting_value_and_remedy(problems_of, changes, world_size, setting, remedy):
    (problem,) = problems_of(changes, world_size)
    assert problem.startswith(f"training.{setting}:")
    assert remedy in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"training.rampup_batch_size": [2, 2, 1]},
        {"training.lr_decay_style": "WSD", "training.train_iters": 5, "training.lr_warmup_iters": 4},
        {"training.epochs": 1, "training.lr_warmup_iters": 2000},  # checked when the number of iterations is known
    ],
)
def test_valid_combinations_pass(problems_of, changes):
    assert problems_of(changes, 2) == []
