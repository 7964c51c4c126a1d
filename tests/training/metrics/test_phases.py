"""Seconds of each phase, and how long the device had nothing to do."""

from __future__ import annotations

import pytest

from megatron_vlm.training.metrics import phases
from megatron_vlm.training.metrics.phases import PhaseTimer, seconds


class Clock:
    """Advances only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(phases, "_mark", made)
    return made


def _step(timer: PhaseTimer, clock: Clock, waits: list[float]) -> None:
    """Rows that are waited for, 1 second of work each, then an update of half a second."""
    timer.start_step()
    with timer.phase("forward_backward"):
        for wait in waits:
            with timer.phase("data"):
                clock.now += wait
            clock.now += 1.0
    with timer.phase("optimizer"):
        clock.now += 0.5
    timer.end_step()


def test_waiting_for_rows_is_idle_and_no_computation(clock: Clock) -> None:
    timer = PhaseTimer()
    _step(timer, clock, [0.25, 0.5])
    found, idle = seconds(timer.take())
    between_steps = {"checkpoint": 0.0, "evaluation": 0.0, "generation": 0.0}
    assert found == {"data": 0.75, "forward_backward": 2.0, "optimizer": 0.5, **between_steps}
    assert idle == 0.75
    assert seconds(timer.take())[1] == 0, "taken once"


def test_between_steps_only_what_is_neither_saved_nor_evaluated_is_idle(clock: Clock) -> None:
    timer = PhaseTimer()
    _step(timer, clock, [0.0])
    with timer.phase("evaluation"):
        clock.now += 8.0
    found, idle = seconds(timer.take())
    assert (found["evaluation"], idle) == (8.0, 0.0)
    clock.now += 0.125  # logging
    with timer.phase("checkpoint"):
        clock.now += 4.0
    _step(timer, clock, [0.0])
    found, idle = seconds(timer.take())
    assert (found["checkpoint"], idle) == (4.0, 0.125)
    _step(timer, clock, [0.0])
    assert seconds(timer.take())[1] == 0.0
