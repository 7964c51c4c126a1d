"""Planned bytes against those counted on every rank of real layouts: weights, gradients, optimizer, saved tensors."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from tests.planner.run_memory import CASES, FULL_CASES, HELD_OUT, Case
from tests.support.forked_ranks import launch_forked
from tests.support.planned_bytes import check_planned

SETS = {"quick": CASES, "full": [*FULL_CASES, *HELD_OUT]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Set -> case -> what each of four ranks counted and planned."""

    @cache
    def of_set(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name)
        cases = [case.name for case in SETS[name]]
        launch_forked("-m", "tests.planner.run_memory", str(folder), *cases, ranks=4, timeout=400)
        found: dict[str, Any] = json.loads((folder / "memory.json").read_text())
        return found

    return of_set


def _parametrized() -> list[Any]:
    return [
        pytest.param(name, case, id=case.name, marks=[pytest.mark.full] if name == "full" else [])
        for name, cases in SETS.items()
        for case in cases
    ]


@pytest.mark.parametrize(("name", "case"), _parametrized())
def test_planned_bytes_are_those_counted(results: Any, name: str, case: Case) -> None:
    for rank, found in enumerate(results(name)[case.name]):
        check_planned(found["counted"], found["planned"], f"on rank {rank}")


def test_a_stage_without_trained_parameters_has_no_gradients_and_no_optimizer_state(results: Any) -> None:
    """Only the projector is trained; it is on the first of four stages."""
    first, *others = results("quick")["pp4, projector"]
    assert first["counted"]["gradients"] and first["counted"]["optimizer"]
    for found in others:
        assert found["counted"]["gradients"] == found["counted"]["optimizer"] == 0
