"""A progress bar over the whole demo, with the time left, below the output of its steps.

Steps have weights: the seconds that each took where they were measured. What this machine needs for a second of weight
follows from what it has done so far, so that the estimate is right on a slower or busier machine, too.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

_PRIOR = 20.0
"""Seconds of weight for which this machine is taken to be the measured one before it has done anything."""
_ITERATION = re.compile(r"\biteration +(\d+)/(\d+) ")
_BAR_WIDTH = 30
_REDRAW_SECONDS = 1.0
_LINE_SECONDS = 30.0
"""Between progress lines where the output is not a terminal."""


def minutes(seconds: float) -> str:
    """62 -> `1:02`."""
    whole, rest = divmod(int(seconds), 60)
    return f"{whole}:{rest:02d}"


class Estimate:
    """Share done and seconds left of steps with weights, from the time that this run has taken so far."""

    def __init__(self, weights: list[float], now: Callable[[], float] = time.monotonic) -> None:
        self.weights, self.now = weights, now
        self.started = now()
        self.done = 0.0
        """Weight of finished steps, those of earlier runs included."""
        self.earlier = 0.0
        """Weight that earlier runs have done; it says nothing about the speed of this one."""
        self.measured = 0.0
        """Seconds of this run until it last got on: what has gone since then belongs to work that is not yet seen."""
        self.step, self.share = 0, 0.0
        """The current step, and the share of it that is done."""

    def skip(self) -> None:
        """The current step was finished by an earlier run."""
        self.earlier += self.weights[self.step]
        self.finish()

    def resume(self, share: float) -> None:
        """An earlier run did this share of the current step."""
        self.earlier += share * self.weights[self.step]
        self.share = share

    def finish(self) -> None:
        """The current step is finished."""
        self.done += self.weights[self.step]
        self.step, self.share = self.step + 1, 0.0
        self.measured = self.elapsed

    def read(self, line: str) -> None:
        """Take the share of the current step from a line of training's output, if it has an iteration."""
        found = _ITERATION.search(line)
        if found and (share := int(found[1]) / int(found[2])) > self.share:
            self.share, self.measured = share, self.elapsed

    @property
    def elapsed(self) -> float:
        """Seconds of this run."""
        return self.now() - self.started

    @property
    def work_done(self) -> float:
        """Weight that is done, that of earlier runs included."""
        return self.done + (self.share * self.weights[self.step] if self.step < len(self.weights) else 0.0)

    @property
    def percent(self) -> float:
        return 100 * self.work_done / sum(self.weights)

    @property
    def seconds_left(self) -> float:
        """Of the steps that are left, at the speed of this run."""
        pace = (self.measured + _PRIOR) / (self.work_done - self.earlier + _PRIOR)
        return (sum(self.weights) - self.work_done) * pace

    def text(self) -> str:
        """`[#####.....]  48 %   5:10 gone, about 5:35 left`"""
        full = round(_BAR_WIDTH * self.percent / 100)
        bar = "#" * full + "." * (_BAR_WIDTH - full)
        return f"[{bar}] {self.percent:3.0f} %   {minutes(self.elapsed)} gone, about {minutes(self.seconds_left)} left"


class ProgressBar:
    """Prints lines, and below them the estimate: redrawn on a terminal, else as a line of its own from time to time."""

    def __init__(self, estimate: Estimate, output: TextIO = sys.stdout) -> None:
        self.estimate, self.output = estimate, output
        self.terminal = output.isatty()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)
        self._thread.start()

    def print(self, line: str = "") -> None:
        """Print a line above the bar."""
        with self._lock:
            self.estimate.read(line)
            self._write(line + "\n")

    def close(self) -> None:
        """Remove the bar. What is printed afterwards is printed as usual."""
        self._closed.set()
        self._thread.join()
        if self.terminal:
            self.output.write("\r\033[K")
            self.output.flush()

    def _write(self, text: str) -> None:
        bar = f"\r\033[K{text}{self.estimate.text()}" if self.terminal else text
        self.output.write(bar)
        self.output.flush()

    def _redraw(self) -> None:
        while not self._closed.wait(_REDRAW_SECONDS if self.terminal else _LINE_SECONDS):
            with self._lock:
                self._write("" if self.terminal else f"{self.estimate.text()}\n")
