"""Results of a long job over samples, kept on the disk while it runs: a job that is killed resumes after the last part.

A part holds the samples [start, stop) and has both numbers in its name. Two processes that do the same job may write
into one folder: parts with the same start agree on the samples that both have.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class PartialFiles:
    """The parts in a folder, which is created by the first one that is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[dict[str, np.ndarray]]:
        """The arrays of the parts that follow each other from sample 0 on, up to a gap or a damaged one."""
        stops: dict[int, tuple[int, Path]] = {}
        for path in self.folder.glob("part-*.arrays"):
            start, stop = map(int, path.stem.split("-")[1:])
            stops[start] = max((stop, path), stops.get(start, (0, path)))
        found: list[dict[str, np.ndarray]] = []
        position = 0
        while position in stops:
            stop, path = stops[position]
            try:
                found.append(map_arrays(path))
            except (OSError, ValueError) as error:
                logger.warning("%s is damaged (%s): what follows is done again", path, error)
                break
            position = stop
        return found

    def write(self, start: int, stop: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep the results of the samples [start, stop). Raises OSError."""
        write_arrays(self.folder / f"part-{start}-{stop}.arrays", **arrays)

    def remove(self) -> None:
        """The job is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def timed_batches(items: Iterator[Item], seconds: float) -> Iterator[tuple[list[Item], bool]]:
    """Lists of the items that arrive within about `seconds`, and whether more may follow; the last may be empty."""
    batch: list[Item] = []
    started = time.monotonic()
    for item in items:
        batch.append(item)
        if time.monotonic() - started >= seconds:
            yield batch, True
            batch, started = [], time.monotonic()
    yield batch, False
