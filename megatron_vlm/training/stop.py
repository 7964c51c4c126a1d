"""Why and when a run stops before its last iteration: a signal, its age, or a number of iterations."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from megatron_vlm.config import Recipe

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_AGE = 1_000
"""In place of a signal's number: training has lasted for exit_duration_in_mins."""


_SAME_SIGNAL_SECONDS = 10.0
"""A scheduler and torchrun each pass a signal on: a rank gets it several times."""


class StopRequest:
    """Asks every iteration whether any rank has a reason to stop; all ranks then stop after the same one."""

    def __init__(self, recipe: Recipe) -> None:
        """A collective call."""
        training = recipe.training
        self._interval, self._minutes = training.exit_interval, training.exit_duration_in_mins
        self._started = time.monotonic()
        self._signal, self._signalled = 0, 0.0
        # Its own group on the host: it must not wait for the GPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=training.distributed_timeout_minutes))

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Inside the block, SIGTERM and SIGUSR1 are noted. One that comes much later again ends the process at once."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._signal:
            self._signal, self._signalled = number, time.monotonic()
        elif time.monotonic() - self._signalled > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def reason(self, iteration: int) -> str | None:
        """Why to stop after `iteration`, the same on every rank; None: continue. A collective call."""
        mine = self._signal
        if not mine and self._minutes is not None and time.monotonic() - self._started >= 60 * self._minutes:
            mine = _AGE
        found = torch.tensor(mine)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        if self._interval is not None and iteration % self._interval == 0:
            return f"exit_interval is {self._interval}"
        if int(found) == _AGE:
            return f"exit_duration_in_mins is {self._minutes}"
        return f"{signal.Signals(int(found)).name} was received" if int(found) else None
