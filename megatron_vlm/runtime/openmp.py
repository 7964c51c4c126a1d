"""The threads with which torch computes on a CPU.

Every Python thread that runs an operation of torch has OpenMP threads of its own, and keeps them. GNU's runtime counts
all of them. If there are more than cores, none waits actively for its next piece of work any more, and the operating
system has to wake it each time. That made steps of the generation engine 1.1 to 1.3 x as long, because the main thread
had loaded the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

_LIBRARY = re.compile(r"/\S*/lib(?:gomp|iomp|omp)[^/\s]*\.so\S*")
_SOFT = 1
"""omp_pause_soft: what the program set stays, such as the number of threads."""


def release_threads() -> None:
    """End the calling thread's idle OpenMP threads (omp_pause_resource_all, OpenMP 5.0); its next operation starts new
    ones. Call it in a thread that computes no more, or not for long, where another one does."""
    for pause in _pause_functions():
        pause(_SOFT)


@functools.cache
def _pause_functions() -> list[Callable[[int], int]]:
    """Of each OpenMP runtime in this process: torch's, and those that other packages bring. None outside Linux."""
    maps = Path("/proc/self/maps")
    libraries = sorted(set(_LIBRARY.findall(maps.read_text()))) if maps.exists() else []
    loaded = []
    for library in libraries:
        with contextlib.suppress(OSError):  # its file was replaced since
            loaded.append(ctypes.CDLL(library))
    # Not in runtimes from before OpenMP 5.0.
    return [library.omp_pause_resource_all for library in loaded if hasattr(library, "omp_pause_resource_all")]
