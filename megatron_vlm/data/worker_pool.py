"""The same done to many samples by several processes, with progress.

The processes end with the one that started them, however that ends: work that goes on after its caller was killed would
write into what the next caller is making.
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
    """What `parallel_map` does. Processes are forked with it: a function that holds a large annotation file is never
    pickled.

    Each chunk has a place in `done` that only its process writes to, so that no lock is needed: one that is killed
    could take it along.
    """

    def __init__(self, function: Callable[[int], Any], chunks: list[range], counted: bool) -> None:
        self.function = function
        self.chunks = chunks
        self.counted = counted
        """A number is a sample; otherwise the function tells how many it has done."""
        self.done = RawArray(c_longlong, max(len(chunks), 1))
        self.place = 0

    def run(self, place: int) -> list[Any]:
        self.place = place
        results = []
        for number in self.chunks[place]:
            results.append(self.function(number))
            self.done[place] += self.counted
        return results


_work: _Work | None = None
"""Of this process."""


def report_progress(samples: int) -> None:
    """For a function of `parallel_map` whose numbers stand for several samples, given singly: how many are done."""
    if _work is not None:
        _work.done[_work.place] = samples


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
        function: what is done; small results, for they wait in memory.
        total: how many numbers there are.
        processes: default: as many as this machine's cores; never more than there is work for.
        label: what is being done, for progress and errors.
        chunk: numbers that a process is given at a time.
        samples: for progress, how many the numbers stand for, which the function then tells with `report_progress`;
            default: one each.
        samples_before: that were done by an earlier call, for progress.

    Raises:
        DataError: a process died.
    """
    global _work
    chunks = [range(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(chunks))
    outer, work = _work, _Work(function, chunks, samples is None)
    _work = work
    progress = Progress(label, total if samples is None else samples, lambda: sum(work.done), samples_before)
    try:
        if processes <= 1:
            with progress:
                for place in range(len(chunks)):
                    yield from work.run(place)
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
        results = pool.map(_run, range(chunks))  # forks; the thread that shows progress starts after it
        with progress:
            for result in results:
                yield from result
    except BrokenProcessPool as error:
        raise DataError(f"{label}: a process died, perhaps for want of memory. Try again with more memory.") from error
    except BaseException:  # stopped by a key, by an error, or no more results are wanted: nobody waits for the rest
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run(place: int) -> list[Any]:
    assert _work is not None
    return _work.run(place)


def _end_with(parent: int) -> None:
    """For a forked process: end when its parent does, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
