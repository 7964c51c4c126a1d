"""Setup and teardown of torch.distributed and megatron-core in a process, with torchrun or without."""

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
from megatron_vlm.runtime import rocm
from megatron_vlm.runtime.device import collective_backend, on_gpu
from megatron_vlm.runtime.process_groups import initialize_groups


def local_rank() -> int:
    """Rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores_per_rank() -> int:
    """Cores that each process of this machine has for itself, by torchrun's LOCAL_WORLD_SIZE; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def local_rank0_first(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on local rank 0 of every machine, then on the other ranks. Every rank of the group calls this."""
    is_local_rank0 = local_rank() == 0
    if not is_local_rank0:
        dist.barrier(group)
    yield
    if is_local_rank0:
        dist.barrier(group)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process_group(timeout_minutes: int = 10) -> Iterator[None]:
    """torch.distributed inside the block; a process started without torchrun has a world size of 1.

    Where a library has set up torch.distributed already, as accelerate does, it is used, and stays after the block.

    After an exception, process groups are destroyed only if the world size is 1. A rank of several must not wait for
    the others: it exits, which closes its connections, so that their next collective fails and torchrun ends them.
    """
    if on_gpu():
        torch.cuda.set_device(local_rank())
        rocm.set_environment()
    if dist.is_initialized():
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
        return
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
            _destroy()
        raise
    _destroy()


def _destroy() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def initialize_model_parallel(parallel: ParallelConfig, *, seed: int = 42, timeout_minutes: int = 10) -> None:
    """megatron-core's process groups and random state for `parallel`, inside a `process_group`."""
    initialize_groups(parallel, timeout_minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def distributed(parallel: ParallelConfig, *, seed: int = 42, timeout_minutes: int = 10) -> Iterator[None]:
    """torch.distributed with megatron-core's process groups and random state for `parallel`, inside the block."""
    with process_group(timeout_minutes):
        initialize_model_parallel(parallel, seed=seed, timeout_minutes=timeout_minutes)
        yield
