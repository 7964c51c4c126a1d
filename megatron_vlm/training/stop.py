"""Why and when a run stops before its last iteration: a signal, its age, or a number of iterations.

The ranks agree on it in the one collective call that each iteration makes on the host; what else they must agree on
between steps, which is whether a checkpoint is still being written, goes along with it.
"""

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

    def ask(self, iteration: int, *, is_writing: bool = False) -> tuple[str | None, bool]:
        """Ask all ranks after an iteration. A collective call.

        Args:
            iteration: that was completed.
            is_writing: whether this rank is writing its share of a checkpoint.

        Returns:
            Why to stop, None: continue; and whether any rank is writing. The same on every rank.
        """
        mine = self._signal
        if not mine and self._minutes is not None and time.monotonic() - self._started >= 60 * self._minutes:
            mine = _AGE
        found = torch.tensor([mine, int(is_writing)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        noted, writing = found.tolist()
        return self._reason(iteration, noted), bool(writing)

    def _reason(self, iteration: int, noted: int) -> str | None:
        if self._interval is not None and iteration % self._interval == 0:
            return f"exit_interval is {self._interval}"
        if noted == _AGE:
            return f"exit_duration_in_mins is {self._minutes}"
        return f"{signal.Signals(noted).name} was received" if noted else None
