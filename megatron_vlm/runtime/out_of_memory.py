"""Out-of-memory errors of a GPU: recognised in whatever library raises them, with advice."""

from __future__ import annotations

import re

import torch

from megatron_vlm.runtime.device import device_name, on_gpu

_MESSAGE = re.compile(r"out of memory|failed to \w+ [cm]alloc|status_alloc_failed", re.IGNORECASE)
_ADVICE = (
    "To reduce memory: set recompute_granularity: full; lower max_tiles_per_row or seq_length; raise "
    "tensor_model_parallel_size, context_parallel_size or pipeline_model_parallel_size; or use more data-parallel "
    "ranks, which shard the optimizer state."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a GPU is out of memory.

    Only torch's allocator raises torch.OutOfMemoryError. NCCL and RCCL (which allocate buffers when a group is first
    used, after torch may have reserved all memory), cuBLAS and the driver are recognised by their messages.
    """
    return isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None


def describe_out_of_memory(error: BaseException) -> str:
    """One line for an out-of-memory `error`: the failed request, the device's memory, and settings that need less."""
    line = next(line for line in str(error).splitlines()[::-1] if _MESSAGE.search(line))
    request = ". ".join(line.split(". ")[:2]).rstrip(".")
    usage = ""
    if on_gpu():
        total, gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, 2**30
        reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
        usage = (
            f" The {device_name()} has {total / gib:.1f} GiB; torch has reserved {reserved / gib:.1f} GiB "
            f"and has used at most {peak / gib:.1f} GiB."
        )
    return f"out of device memory ({request}).{usage} {_ADVICE}"
