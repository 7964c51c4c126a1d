"""Ranks compare what they start from. One that sees other data or settings would spoil training without an error."""

from __future__ import annotations

import hashlib
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_vlm
from megatron_vlm.config import Recipe
from megatron_vlm.config.recipe import iter_settings
from megatron_vlm.runtime.logging import log_rank0

_PATIENCE = timedelta(days=2)
_CLOCK_SECONDS = 60.0
_MAX_DIFFERENCES = 10
_PER_NODE = {"data.cache_dir"}
"""Settings that may differ between nodes."""


class RanksDisagreeError(RuntimeError):
    """Ranks of one job were started differently or see different files."""


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks whose collectives wait for days; a rank that dies is an error at once. A collective call.

    For the start of a run, where one rank measures a data set and the others wait for it: that may take longer than any
    collective of training may.
    """
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    yield group  # after an error the process ends
    dist.destroy_process_group(group)


def require_agreement(facts: Mapping[str, str], group: dist.ProcessGroup | None = None) -> None:
    """Compare what every rank of the group says. A collective call.

    Args:
        facts: short values by name; every rank gives the same names.
        group: default: all ranks.

    Raises:
        RanksDisagreeError: on every rank; the message names the ranks that differ from the majority, and in what.
    """
    gathered: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (socket.gethostname(), dict(facts)), group=group)
    differences = []
    for name in sorted({name for _, said in gathered for name in said}):
        values = [said.get(name, "unknown") for _, said in gathered]
        (common, count), *others = Counter(values).most_common()
        differences += [
            f"{name} is {value} on {_describe_ranks(gathered, values, value)}, {common} on "
            f"{'the others' if len(others) == 1 else f'{count} ranks'}"
            for value, _ in others
        ]
    if differences:
        hidden = len(differences) - _MAX_DIFFERENCES
        raise RanksDisagreeError(
            "ranks of this job do not start from the same: "
            + "; ".join(differences[:_MAX_DIFFERENCES])
            + (f"; and {hidden} more differences" if hidden > 0 else "")
            + ". Start all ranks with the same command and code, and with data and checkpoints that all nodes see alike"
        )


def _describe_ranks(gathered: list[tuple[str, dict[str, str]]], values: list[str], value: str) -> str:
    ranks = [rank for rank, found in enumerate(values) if found == value]
    hosts = sorted({gathered[rank][0] for rank in ranks})
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} ({', '.join(hosts[:4])})"


def require_same_start(recipe: Recipe) -> None:
    """Compare recipe, code and versions over all ranks, before process groups are made from them. A collective call.

    A node whose clock differs by a minute or more is named in a warning.

    Raises:
        RanksDisagreeError: see `require_agreement`.
    """
    _warn_of_clocks()
    settings = {item.key: repr(item.value) for item in iter_settings(recipe) if item.key not in _PER_NODE}
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": metadata.version("megatron-core"),
        "megatron-vlm": f"{megatron_vlm.__version__} (source {_source_hash()})",
    }
    require_agreement({**settings, **versions})


def _source_hash() -> str:
    """Of the package's files: nodes may have different versions of the same number."""
    digest = hashlib.sha256()
    root = Path(megatron_vlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _warn_of_clocks() -> None:
    dist.barrier()
    clocks: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
    dist.all_gather_object(clocks, (socket.gethostname(), time.time()))
    for difference in clock_differences(clocks):
        log_rank0(
            f"WARNING: the clock of {difference}: times in a node's log are wrong, and object stores reject requests "
            "of a clock that is far off"
        )


def clock_differences(clocks: list[tuple[str, float]]) -> list[str]:
    """Which clocks are a minute or more off, given every rank's host and time in seconds.

    More than half of the ranks are right. If no such group agrees, as with two nodes, it is not known who is wrong.
    """
    middle = sorted(clock for _, clock in clocks)[len(clocks) // 2]
    wrong = {host: clock - middle for host, clock in clocks if abs(clock - middle) >= _CLOCK_SECONDS}
    right = sum(abs(clock - middle) < _CLOCK_SECONDS for _, clock in clocks)
    if 2 * right > len(clocks):
        return [f"{host} is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}" for host, off in wrong.items()]
    early, first = min(clocks, key=lambda rank: rank[1])
    late, last = max(clocks, key=lambda rank: rank[1])
    return [f"{late} is {last - first:.0f} s ahead of that of {early}"]
