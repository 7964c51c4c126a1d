"""Which kind of machine this is: the only place that asks."""

from __future__ import annotations

import torch


def device_kind() -> str:
    """`cuda`, `rocm` or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def on_gpu() -> bool:
    return device_kind() != "cpu"


def current_device() -> torch.device:
    """The device this process computes on; after launch, its own GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def collective_backend() -> str:
    """torch.distributed's backend for this kind of machine (RCCL answers to `nccl`)."""
    return "nccl" if on_gpu() else "gloo"


def device_name() -> str:
    return torch.cuda.get_device_name() if on_gpu() else "CPU"
