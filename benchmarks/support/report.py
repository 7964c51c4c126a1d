"""Tables and JSON files of the benchmarks."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.runtime.device import device_name

RESULTS = Path(__file__).parent.parent / "results"
"""Default folder of the JSON files; those that the documentation quotes are committed."""


def machine() -> dict[str, Any]:
    """Device, cores, threads and package versions: what the figures depend on besides the code."""
    packages = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def save(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write `content` and the machine's description to FOLDER/NAME.json; returns that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return path
