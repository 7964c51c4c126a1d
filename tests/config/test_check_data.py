"""Checks of data settings against other settings."""

from __future__ import annotations

from collections.abc import Callable


def test_log_samples_needs_a_save_folder(problems_of: Callable[..., list[str]]) -> None:
    (problem,) = problems_of({"data.log_samples": True})
    assert "data.log_samples = True" in problem and "training.save" in problem
    assert not problems_of({"data.log_samples": True, "training.save": "runs/one"})


def test_the_best_checkpoint_needs_validation_data_and_a_folder(problems_of: Callable[..., list[str]]) -> None:
    problems = problems_of({"training.best_metric": "eval_loss"})
    assert len(problems) == 2 and all("training.best_metric = eval_loss" in problem for problem in problems)
    changes = {"training.best_metric": "eval_loss", "training.save": "runs/one", "data.valid_share": 0.1}
    assert not problems_of(changes)
    (problem,) = problems_of({**changes, "data.valid_data_path": ["other.json"]})
    assert "data.valid_share = 0.1" in problem and "Remove one" in problem


def test_generated_samples_need_validation_data_a_folder_and_no_fp8(problems_of: Callable[..., list[str]]) -> None:
    problems = problems_of({"training.eval_generate_samples": 4})
    assert len(problems) == 2 and all("training.eval_generate_samples = 4" in problem for problem in problems)
    changes = {"training.eval_generate_samples": 4, "training.save": "runs/one", "data.valid_share": 0.1}
    assert not problems_of(changes)
    problems = problems_of({**changes, "training.fp8_format": "hybrid"})
    assert any("rows of one token" in problem for problem in problems)
