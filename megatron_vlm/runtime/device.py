"""Which kind of machine this is: the only place that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., torch.Tensor])


def device_kind() -> str:
    """`cuda`, `rocm` or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def on_gpu() -> bool:
    return device_kind() != "cpu"


def fused(function: _Function) -> _Function:
    """A chain of elementwise operations as one kernel on a GPU, rounded once at its end, its inputs alone kept for
    backward. On a CPU it is left as it is: compiling takes 15 s there, in every process.
    """
    return cast(_Function, torch.compile(function)) if on_gpu() else function


def current_device() -> torch.device:
    """The device this process computes on; after launch, its own GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def collective_backend() -> str:
    """torch.distributed's backend for this kind of machine (RCCL answers to `nccl`)."""
    return "nccl" if on_gpu() else "gloo"


def device_name() -> str:
    return torch.cuda.get_device_name() if on_gpu() else "CPU"
