"""The same done to many samples by several processes, with progress."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_vlm.data.errors import DataError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_CHUNK = 256
_SECONDS_BETWEEN_REPORTS = 5.0

_forked: Callable[[int], Any] | None = None
"""What the processes forked by `map_numbers` call: a function that holds a large annotation file is not sent to them.
"""


def map_numbers(
    function: Callable[[int], Result], total: int, processes: int | None, label: str, chunk: int = _CHUNK
) -> Iterator[Result]:
    """function(0), function(1), … in order.

    Args:
        function: what is done; small results, for they wait in memory.
        total: how many numbers there are.
        processes: default: as many as this machine's cores; never more than there is work for.
        label: what is being done, for progress and errors.
        chunk: numbers that a process is given at a time.

    Raises:
        DataError: a process died.
    """
    chunks = [range(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(chunks))
    started = reported = time.monotonic()
    done = 0
    for results in _map_chunks(function, chunks, processes, label):
        yield from results
        done += len(results)
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            reported = now
            logger.info("%s: %d of %d samples, %.0f/s", label, done, total, done / (now - started))


def _map_chunks(
    function: Callable[[int], Result], chunks: list[range], processes: int, label: str
) -> Iterator[list[Result]]:
    global _forked
    if processes <= 1:
        for chunk in chunks:
            yield [function(number) for number in chunk]
        return
    _forked = function
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_run_chunk, chunks)
    except BrokenProcessPool as error:
        raise DataError(f"{label}: a process died, perhaps for want of memory. Try again with more memory.") from error
    finally:
        _forked = None


def _run_chunk(chunk: range) -> list[Any]:
    assert _forked is not None
    return [_forked(number) for number in chunk]
