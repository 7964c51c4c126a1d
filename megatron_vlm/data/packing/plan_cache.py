"""Plans of epochs on disk: made once on a machine, mapped into memory by all its ranks, the next one made ahead.

A plan is kept under a name made of everything it follows from. The first process that needs it makes it while the
others wait at a lock; a process that was killed leaves the lock and nothing else. Without a folder that can be written
every process makes its own plans, which are the same. Files of a folder may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.packing.epoch_plan import EpochPlan

logger = logging.getLogger(__name__)

_NICENESS = 10


class PlanCache:
    """Gives the plan of an epoch, from its file if there is one."""

    def __init__(self, folder: Path, key: str, compute: Callable[[int], EpochPlan]) -> None:
        """
        Args:
            folder: where plans are kept.
            key: names everything that plans follow from, besides the epoch.
            compute: makes the plan of an epoch.
        """
        self._folder, self._key, self._compute = folder, key, compute
        self._ahead: Connection | None = None

    def __call__(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; asks for the next one to be made."""
        plan = self._get(epoch)
        if self._ahead is not None:
            try:
                self._ahead.send(epoch + 1)
            except OSError:  # the helper is gone: plans are made when they are needed
                self._ahead = None
        return plan

    def plan_ahead(self) -> None:
        """Start a process that makes the plan after each one that is asked for; it ends with this process."""
        ours, theirs = multiprocessing.Pipe()
        helper = multiprocessing.get_context("fork").Process(target=self._serve, args=(ours, theirs), daemon=True)
        helper.start()
        theirs.close()
        self._ahead = ours
        weakref.finalize(self, ours.close)

    def _serve(self, ours: Connection, theirs: Connection) -> None:
        ours.close()  # or the end of the process that asks would go unnoticed
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.nice(_NICENESS)
        while True:
            try:
                epoch = theirs.recv()
            except (EOFError, OSError):
                os._exit(0)
            self._make(epoch, wait=False)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"plan-{self._key}-{epoch}.arrays"

    def _get(self, epoch: int) -> EpochPlan:
        plan = self._open(epoch) or self._make(epoch, wait=True) or self._open(epoch)
        assert plan is not None
        return plan

    def _make(self, epoch: int, wait: bool) -> EpochPlan | None:
        """Make a plan and keep it; returns it where it cannot be kept. Without `wait`, None if another is at it."""
        try:
            with self._lock(epoch, wait) as mine:
                if not mine or self._open(epoch) is not None:
                    return None
                plan = self._compute(epoch)
                fill = np.array([plan.packing_efficiency])
                write_arrays(self._path(epoch), row_starts=plan.row_starts, members=plan.members, fill=fill)
        except OSError as error:
            if not wait:
                return None
            logger.warning("plans cannot be kept in %s (%s): every process makes its own", self._folder, error)
            return self._compute(epoch)
        return self._open(epoch)

    @contextmanager
    def _lock(self, epoch: int, wait: bool) -> Iterator[bool]:
        """Whether this process has the lock of an epoch's plan. The system gives it back when a process ends."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(epoch).with_suffix(".lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)

    def _open(self, epoch: int) -> EpochPlan | None:
        try:
            arrays = map_arrays(self._path(epoch))
            return EpochPlan(arrays["row_starts"], arrays["members"], float(arrays["fill"][0]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            logger.warning("plan %s is damaged (%s) and is made anew", self._path(epoch), error)
            return None
