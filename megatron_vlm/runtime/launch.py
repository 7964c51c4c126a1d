"""Start and stop of a distributed process, under torchrun or alone."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)

# isort: split
from megatron.core import parallel_state, tensor_parallel

from megatron_vlm.config import ParallelConfig
from megatron_vlm.runtime.device import collective_backend, on_gpu
from megatron_vlm.runtime.process_groups import initialize_groups


def world_size() -> int:
    """Processes in this job, known before torch.distributed is up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process_group(timeout_minutes: int = 10) -> Iterator[None]:
    """torch.distributed for the time of the block; a process started without torchrun is a world of one.

    A rank that leaves through an exception does not wait for the others: its connections close, so that their next
    collective fails at once, and torchrun ends them. Alone, it leaves nothing behind.
    """
    if on_gpu():
        torch.cuda.set_device(local_rank())
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(collective_backend(), timeout=timeout)
    else:
        dist.init_process_group(
            collective_backend(), init_method=f"tcp://127.0.0.1:{_free_port()}", rank=0, world_size=1, timeout=timeout
        )
    try:
        yield
    except BaseException:
        if dist.get_world_size() == 1:
            _leave()
        raise
    _leave()


def _leave() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def distributed(parallel: ParallelConfig, *, seed: int = 42, timeout_minutes: int = 10) -> Iterator[None]:
    """A process group with megatron-core's groups and random state for `parallel`, for the time of the block."""
    with process_group(timeout_minutes):
        initialize_groups(parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield
