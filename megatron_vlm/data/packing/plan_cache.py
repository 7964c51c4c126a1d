"""Epoch plans on disk: computed once per machine, memory-mapped by all its ranks, the next epoch computed ahead.

The name of a file is a hash of everything the plan depends on. The first process that needs a plan computes it while
the others wait for a file lock, which the system releases when a process ends or is killed. If the folder cannot be
written, every process computes its own plans, which are the same. Files may be deleted at any time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.packing.epoch_plan import EpochPlan
from megatron_vlm.runtime.file_lock import file_lock

logger = logging.getLogger(__name__)

_NICENESS = 10


class PlanCache:
    """Returns the plan of an epoch, from its file if it is cached."""

    def __init__(self, folder: Path, key: str, compute: Callable[[int], EpochPlan]) -> None:
        """
        Args:
            folder: the cache folder.
            key: hash of everything that plans depend on, except the epoch.
            compute: computes the plan of an epoch.
        """
        self._folder, self._key, self._compute = folder, key, compute
        self._ahead: Connection | None = None

    def __call__(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. Starts computing the next one if there is a helper process."""
        plan = self._get(epoch)
        if self._ahead is not None:
            try:
                self._ahead.send(epoch + 1)
            except OSError:  # the helper process ended: plans are computed when they are needed
                self._ahead = None
        return plan

    def plan_ahead(self) -> None:
        """Start a helper process that computes the plan after each requested one. It ends with this process."""
        parent_end, helper_end = multiprocessing.Pipe()
        args = (parent_end, helper_end)
        helper = multiprocessing.get_context("fork").Process(target=self._serve, args=args, daemon=True)
        helper.start()
        helper_end.close()
        self._ahead = parent_end
        weakref.finalize(self, parent_end.close)

    def _serve(self, parent_end: Connection, helper_end: Connection) -> None:
        parent_end.close()  # as long as it is open here, recv() does not notice that the parent ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.nice(_NICENESS)
        while True:
            try:
                epoch = helper_end.recv()
            except (EOFError, OSError):
                os._exit(0)
            self._compute_and_write(epoch, wait=False)

    def _path(self, epoch: int) -> Path:
        return self._folder / f"plan-{self._key}-{epoch}.arrays"

    def _get(self, epoch: int) -> EpochPlan:
        plan = self._read(epoch) or self._compute_and_write(epoch, wait=True) or self._read(epoch)
        assert plan is not None
        return plan

    def _compute_and_write(self, epoch: int, wait: bool) -> EpochPlan | None:
        """Compute and cache a plan; returns None if another process did, or without `wait`, if one does so now."""
        try:
            with file_lock(self._path(epoch).with_suffix(".lock"), wait=wait, purpose="planning rows") as locked:
                if not locked or self._read(epoch) is not None:
                    return None
                plan = self._compute(epoch)
                fill = np.array([plan.packing_efficiency])
                write_arrays(self._path(epoch), row_starts=plan.row_starts, members=plan.members, fill=fill)
        except OSError as error:
            if not wait:
                return None
            logger.warning("plans cannot be cached in %s (%s): every process computes its own", self._folder, error)
            return self._compute(epoch)
        return self._read(epoch)

    def _read(self, epoch: int) -> EpochPlan | None:
        try:
            arrays = map_arrays(self._path(epoch))
            return EpochPlan(arrays["row_starts"], arrays["members"], float(arrays["fill"][0]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            logger.warning("plan %s is damaged (%s) and is computed again", self._path(epoch), error)
            return None
