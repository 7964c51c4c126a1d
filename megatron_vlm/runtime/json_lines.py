"""JSON Lines files that a run appends to and may be killed while it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_vlm.runtime.atomic_files import atomic_file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; a line that a killed process left unfinished is ignored."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file with the wanted lines only, atomically: a process killed meanwhile leaves it unchanged."""
    with atomic_file(path) as kept:
        for entry in read_lines(path):
            if wanted(entry):
                kept.write(json.dumps(entry).encode() + b"\n")
