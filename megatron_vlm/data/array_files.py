"""Named numpy arrays in one memory-mapped file: the processes of a machine that open it share its pages.

The file is a sequence of .npy records, each aligned to 64 bytes. The first record holds the names of the other arrays
as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

import numpy as np

from megatron_vlm.runtime.atomic_files import atomic_file

_ALIGNMENT = 64


def cache_folder(source: str | Path, cache_dir: str | Path | None) -> Path:
    """Folder of the files computed from a source: `cache_dir`, or `.lengths` beside the source."""
    return Path(cache_dir) if cache_dir else Path(source).parent / ".lengths"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays; an existing file is replaced. Raises OSError."""
    names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
    with atomic_file(path) as file:
        for array in (names, *arrays.values()):
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            file.write(bytes(-file.tell() % _ALIGNMENT))


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, read-only and memory-mapped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError, OSError: it is not an array file, or it is truncated.
    """
    with path.open("rb") as file:
        names = json.loads(_map_next(path, file).tobytes())
        return {name: _map_next(path, file) for name in names}


def _map_next(path: Path, file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{path} holds .npy data of version {version}; this reader needs (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if fortran or dtype.hasobject or start + size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{path} is truncated or not an array file")
    file.seek(start + size + -(start + size) % _ALIGNMENT)
    if not size:  # an empty region cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)
