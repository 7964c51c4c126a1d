"""Python's garbage collection at fixed iterations, on all ranks at once (Megatron-LM's --manual-gc).

Python collects when enough objects were made, at another moment on each rank. Every collection walks the objects of the
model and its libraries, and each one keeps all ranks waiting in the next collective.
"""

from __future__ import annotations

import gc


class ScheduledCollection:
    """Collects every `interval` iterations and at no other time; 0: whenever Python decides."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        if interval:
            gc.collect()
            gc.freeze()  # what exists now stays: later collections do not walk it
            gc.disable()

    def after(self, iteration: int) -> None:
        """Collect if it is time to."""
        if self.interval and iteration % self.interval == 0:
            gc.collect()

    def close(self) -> None:
        """Give collection back to Python."""
        if self.interval:
            gc.unfreeze()
            gc.enable()
