"""The device a process computes on: CUDA, ROCm or CPU. No other module queries torch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def device_kind() -> str:
    """`cuda`, `rocm` or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def on_gpu() -> bool:
    return device_kind() != "cpu"


def fused(function: _Function) -> _Function:
    """Compile elementwise operations into one kernel that rounds once and saves only its inputs for backward.

    On a CPU the function is returned unchanged: compiling would take 15 s in every process.
    """
    return cast(_Function, torch.compile(function)) if on_gpu() else function


def current_device() -> torch.device:
    """The device of this process; after launch, its own GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def collective_backend() -> str:
    """torch.distributed's backend: gloo on a CPU, otherwise nccl, which is RCCL on ROCm."""
    return "nccl" if on_gpu() else "gloo"


def device_memory() -> int | None:
    """Bytes that this process may allocate on its GPU; None on a CPU."""
    if not on_gpu():
        return None
    total = torch.cuda.get_device_properties(current_device()).total_memory
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()  # not in torch 2.6
    return int(total * share)


def free_device_memory() -> int | None:
    """Bytes that this process can still allocate on its GPU; None on a CPU."""
    total = device_memory()
    if total is None:
        return None
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(free + unused, total - torch.cuda.memory_allocated())


def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, such as (9, 0)."""
    return torch.cuda.get_device_capability()


def device_name() -> str:
    return torch.cuda.get_device_name() if on_gpu() else "CPU"
