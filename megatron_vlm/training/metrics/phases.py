"""Where the time of a step is spent, without waiting for the device.

On a GPU the phases are measured by events, which the device stamps when it gets there. The time that a device stands
still is the time between the event before a wait of the host and the event after it: if the device still has work when
the host waits for a row, both are stamped at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from megatron_vlm.runtime.device import on_gpu

Phase = Literal["data", "forward_backward", "optimizer", "checkpoint", "evaluation", "generation"]
PHASES: tuple[Phase, ...] = ("data", "forward_backward", "optimizer", "checkpoint", "evaluation", "generation")
_WAITING, _NOT_WAITING = "between steps", "phase between steps"

Marks = list[tuple[str, Any, Any]]
"""(phase, mark before, mark after)"""


class PhaseTimer:
    """Marks the beginning and end of phases. `take` gives the marks, `seconds` what they mean."""

    def __init__(self) -> None:
        self._marks: Marks = []
        self._between_steps: Marks = []
        self._end_of_step: Any = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase. `data` is inside of `forward_backward` and is not counted there."""
        before = _mark()
        try:
            yield
        finally:
            mark = (name, before, _mark())
            self._marks.append(mark)
            self._between_steps.append(mark)

    def start_step(self) -> None:
        """The host gives the device work again; call before the first forward pass of a step."""
        if self._end_of_step is not None:
            self._marks.append((_WAITING, self._end_of_step, _mark()))
            self._marks += [(_NOT_WAITING, before, after) for _, before, after in self._between_steps]

    def end_step(self) -> None:
        """The host has given the device all work of a step."""
        self._end_of_step, self._between_steps = _mark(), []

    def take(self) -> Marks:
        """The marks since the last call."""
        taken, self._marks = self._marks, []
        return taken


def seconds(marks: Marks) -> tuple[dict[str, float], float]:
    """Seconds of each phase, and how long the device stood still for want of work: of rows, or between two steps where
    nothing is evaluated or saved. The device must have passed all marks.
    """
    totals = dict.fromkeys((*PHASES, _WAITING, _NOT_WAITING), 0.0)
    for name, before, after in marks:
        totals[name] += _difference(before, after)
    idle = totals["data"] + totals.pop(_WAITING) - totals.pop(_NOT_WAITING)
    totals["forward_backward"] -= totals["data"]
    return totals, max(idle, 0.0)


def _mark() -> Any:
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _difference(before: Any, after: Any) -> float:
    return float(after - before) if isinstance(before, float) else float(before.elapsed_time(after)) / 1000
