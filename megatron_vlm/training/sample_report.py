"""Records of steps that somebody should look at, with the ids of their samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

_SHOWN_SAMPLES = 8


def gather_samples(sample_ids: list[str]) -> list[str]:
    """The samples of all ranks, each of which gives those that it counts; a collective call."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sample_ids)
    return [name for names in gathered for name in names]


def describe_samples(samples: list[str]) -> str:
    """Their number and the first few, for a log line."""
    shown = ", ".join(samples[:_SHOWN_SAMPLES]) + (", ..." if len(samples) > _SHOWN_SAMPLES else "")
    return f"Its {len(samples)} samples: {shown}"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a JSON object to a file, on rank 0."""
    if dist.get_rank() == 0:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
