"""What is computed from a file is kept in a folder, as long as the file has the same size and modification time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.runtime.file_lock import file_lock

_STATE = "state"

Arrays = dict[str, np.ndarray]


def file_state(status: os.stat_result) -> np.ndarray:
    """[2] int64: size and modification time (ns) of a file."""
    return np.array([status.st_size, status.st_mtime_ns], np.int64)


def cache_name(path: Path) -> str:
    """Beginning of the names of files that are computed from `path`, which tells folders apart."""
    where = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{path.stem}-{where}"


def computed_once(
    path: Path, state: Callable[[], np.ndarray], cache: Path, kind: str, compute: Callable[[], Arrays]
) -> Arrays:
    """The arrays that `compute` returns, from the cache if the file is as it was then.

    Of several processes that call this at once, also of several machines, one computes and the others wait.

    Args:
        path: of the file.
        state: returns its size and modification time now, see `file_state`.
        cache: folder. If it cannot be written, every process computes, and the measuring of lengths reports it.
        kind: what is computed, one word that is part of the name of the file.
        compute: reads the file.
    """
    target = cache / f"{cache_name(path)}.{kind}.arrays"
    found = _read(target, state())
    if found is None:
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(file_lock(target.with_suffix(".lock"), purpose=f"reading {path}"))
            before = state()
            found = _read(target, before)
            if found is None:
                found = compute()
                if (state() == before).all():
                    with suppress(OSError):
                        write_arrays(target, **found, **{_STATE: before})
    return found


def _read(target: Path, state: np.ndarray) -> Arrays | None:
    try:
        arrays = map_arrays(target)
        return arrays if (arrays.pop(_STATE) == state).all() else None
    except (OSError, ValueError, KeyError):  # absent or damaged
        return None
