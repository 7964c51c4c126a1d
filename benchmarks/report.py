"""What every benchmark prints and keeps."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.runtime.device import device_name

RESULTS = Path(__file__).parent / "results"
"""Where figures are kept that are meant to be looked up later."""


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
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
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not place else ":") for place, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def save(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write FOLDER/NAME.json with the machine beside the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return path
