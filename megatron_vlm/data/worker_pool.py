"""A parallel map over samples in forked processes, with progress.

Worker processes end with their parent, even if it is killed. Otherwise a worker could write into the output of the next
caller.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_longlong
from multiprocessing.sharedctypes import RawArray
from typing import Any, TypeVar

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.progress import Progress

Result = TypeVar("Result")

_CHUNK = 256
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class _Work:
    """What `parallel_map` computes. Workers are forked with it, so a function that holds a large annotation file is not
    pickled.

    Each chunk has an entry of `done`, which only the process of that chunk writes to. So no lock is needed, which a
    process that is killed could keep.
    """

    def __init__(self, function: Callable[[int], Any], chunks: list[range], count_calls: bool) -> None:
        self.function = function
        self.chunks = chunks
        self.count_calls = count_calls
        """Each call is one sample; otherwise the function calls `report_progress`."""
        self.done = RawArray(c_longlong, max(len(chunks), 1))
        self.chunk = 0
        """Index of the chunk that this process works on."""

    def run(self, chunk: int) -> list[Any]:
        self.chunk = chunk
        results = []
        for index in self.chunks[chunk]:
            results.append(self.function(index))
            self.done[chunk] += self.count_calls
        return results


_work: _Work | None = None
"""Of this process."""


def report_progress(samples: int) -> None:
    """Report how many samples the current call has done. For functions of `parallel_map` with `chunk` 1 that process
    several samples per call.
    """
    if _work is not None:
        _work.done[_work.chunk] = samples


def parallel_map(
    function: Callable[[int], Result],
    total: int,
    processes: int | None,
    label: str,
    chunk: int = _CHUNK,
    samples: int | None = None,
    samples_before: int = 0,
) -> Iterator[Result]:
    """function(0), function(1), … in order.

    Args:
        function: called in worker processes. Its results should be small: they are queued in memory.
        total: number of calls.
        processes: number of worker processes; default: one per core; never more than there are chunks.
        label: what the job does, for progress and errors.
        chunk: number of calls that are sent to a process at a time.
        samples: total for progress, those before included, if a call processes several samples and reports them with
            `report_progress`; default: one per call.
        samples_before: samples done by an earlier run of the job, for progress.

    Raises:
        DataError: a worker process died.
    """
    global _work
    chunks = [range(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(chunks))
    outer, work = _work, _Work(function, chunks, samples is None)
    _work = work
    if samples is None:
        samples = samples_before + total
    progress = Progress(label, samples, lambda: sum(work.done), samples_before)
    try:
        if processes <= 1:
            with progress:
                for index in range(len(chunks)):
                    yield from work.run(index)
        else:
            yield from _fork(len(chunks), processes, label, progress)
    finally:
        _work = outer


def _fork(chunks: int, processes: int, label: str, progress: Progress) -> Iterator[Any]:
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("fork"), initializer=_end_with, initargs=(os.getpid(),)
    )
    try:
        results = pool.map(_run, range(chunks))  # forks before the progress thread starts
        with progress:
            for result in results:
                yield from result
    except BrokenProcessPool as error:
        raise DataError(
            f"{label}: a worker process died, possibly out of memory. Start again with more memory or fewer processes."
        ) from error
    except BaseException:  # Ctrl-C, an error, or the caller stopped iterating: do not wait for the remaining chunks
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run(chunk: int) -> list[Any]:
    assert _work is not None
    return _work.run(chunk)


def _end_with(parent: int) -> None:
    """Make a forked process end when its parent does, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call of prctl
        os._exit(1)
