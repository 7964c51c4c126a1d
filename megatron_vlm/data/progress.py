"""Progress of a long job: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

logger = logging.getLogger(__name__)

_BAR_SECONDS = 0.3
"""Between two updates of the bar."""
_LOG_SECONDS = 10.0
"""Between two lines in the log."""
_BAR_DELAY = 2.0
"""Seconds before the bar appears: shorter jobs show none."""


class Progress:
    """A context manager that shows progress from a thread, which polls how much is done."""

    def __init__(self, label: str, total: int, done: Callable[[], int], before: int = 0) -> None:
        """
        Args:
            label: what the job does.
            total: number of samples, `before` included.
            done: returns the number of samples done so far, `before` not included.
            before: samples done by an earlier run of the job.
        """
        self.label, self.total, self.done, self.before = label, total, done, before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        if sys.stderr.isatty():
            self._show_bar()
        else:
            self._log_lines()

    def _show_bar(self) -> None:
        bar = tqdm(
            desc=self.label, total=self.total, initial=self.before, unit=" samples", unit_scale=True, delay=_BAR_DELAY
        )
        with bar:
            while not self._stop.wait(_BAR_SECONDS):
                bar.update(self.before + self.done() - bar.n)
            bar.update(self.before + self.done() - bar.n)

    def _log_lines(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(_LOG_SECONDS):
            done = self.done()
            rate = done / (time.monotonic() - started)
            remaining = f", {_duration((self.total - self.before - done) / rate)} remaining" if rate else ""
            logger.info(
                "%s: %s of %s samples, %s/s%s", self.label, f"{self.before + done:,}", f"{self.total:,}",
                f"{rate:,.0f}", remaining,
            )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
