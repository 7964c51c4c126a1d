"""Files of one JSON object a line that a run adds to until it is killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_vlm.runtime.atomic_files import atomic_file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, without one that a killed process did not finish."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Take all other lines out of a file. Who is killed meanwhile leaves it as it was."""
    with atomic_file(path) as kept:
        for entry in read_lines(path):
            if wanted(entry):
                kept.write(json.dumps(entry).encode() + b"\n")
