"""Checks of data settings against other settings."""

from __future__ import annotations

from collections.abc import Callable


def test_log_samples_needs_a_save_folder(problems_of: Callable[..., list[str]]) -> None:
    (problem,) = problems_of({"data.log_samples": True})
    assert "data.log_samples = True" in problem and "training.save" in problem
    assert not problems_of({"data.log_samples": True, "training.save": "runs/one"})
