"""How far a long piece of work is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_WITHOUT = 2.0
"""Work that takes less shows no bar."""


class Progress:
    """Shown while its context lasts, by a thread that asks how far it is."""

    def __init__(self, label: str, total: int, done: Callable[[], int], before: int = 0) -> None:
        """
        Args:
            label: what is being done.
            total: samples in all.
            done: how many are done by now, those not counted that were before.
            before: samples done earlier.
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
            desc=self.label, total=self.total, initial=self.before, unit=" samples", unit_scale=True,
            delay=_SECONDS_WITHOUT,
        )  # fmt: skip
        with bar:
            while not self._stop.wait(_SECONDS_BETWEEN_LOOKS):
                bar.update(self.before + self.done() - bar.n)
            bar.update(self.before + self.done() - bar.n)

    def _log_lines(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(_SECONDS_BETWEEN_LINES):
            done = self.done()
            speed = done / (time.monotonic() - started)
            left = f", {_duration((self.total - self.before - done) / speed)} to go" if speed else ""
            logger.info(
                "%s: %s of %s samples, %s/s%s", self.label, f"{self.before + done:,}", f"{self.total:,}",
                f"{speed:,.0f}", left,
            )  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
