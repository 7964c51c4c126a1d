"""Ends a rank that makes no progress, after printing where each of its threads is.

If one rank hangs, the others wait for it in a collective. So every rank is late at about the same time, and each prints
its own stacks: the one that differs shows what hangs. The ranks of a machine write to the same log, and faulthandler
writes in many small pieces, so each rank takes its turn.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vlm.runtime.launch import local_rank

_STDERR = 2
"""The descriptor: sys.stderr may have been replaced by an object without one."""
_TURN_SECONDS = 0.25
"""By which a rank is later than the one before it on the machine; torchrun ends the others after 30 s."""


class Watchdog:
    """Python's faulthandler, whose timer runs without the interpreter: also a rank stuck in a library call is ended."""

    def __init__(self, minutes: float) -> None:
        """Nothing is watched before the first `progress`.

        Args:
            minutes: without progress, after which the process prints its stacks to stderr and exits with 1.
        """
        self._seconds = 60 * minutes + _TURN_SECONDS * local_rank()

    def progress(self) -> None:
        """The rank has made progress: the time starts again."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the rank may take any time, as for a checkpoint on a slow disk."""
        self.stop()
        yield
        self.progress()

    def stop(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()
