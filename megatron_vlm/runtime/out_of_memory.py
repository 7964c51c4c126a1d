"""When a GPU's memory does not suffice: knowing it by its many names, and what to do about it."""

from __future__ import annotations

import re

import torch

from megatron_vlm.runtime.device import device_name, on_gpu

_IN_WORDS = re.compile(r"out of memory|failed to \w+ [cm]alloc|status_alloc_failed", re.IGNORECASE)
_ADVICE = (
    "A step needs less with recompute_granularity: full; with a lower max_tiles_per_row or seq_length; with a higher "
    "tensor_model_parallel_size, context_parallel_size or pipeline_model_parallel_size; and with more data-parallel "
    "ranks, which share the optimizer's state."
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is what an error means.

    torch's allocator has a class for it. Who does not ask the allocator has only words: NCCL and RCCL, which make
    buffers when a group is first used and may find that torch holds all there is; cuBLAS; the driver itself.
    """
    return isinstance(error, RuntimeError) and _IN_WORDS.search(str(error)) is not None


def describe_shortage(error: BaseException) -> str:
    """What was wanted, what there is, and which settings make a step smaller, of an error that ran out of memory."""
    line = next(line for line in str(error).splitlines()[::-1] if _IN_WORDS.search(line))
    wanted = ". ".join(line.split(". ")[:2]).rstrip(".")
    there = ""
    if on_gpu():
        whole, gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, 2**30
        held, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()
        there = (
            f" The {device_name()} has {whole / gib:.1f} GiB; torch holds {held / gib:.1f} GiB, and had at most "
            f"{peak / gib:.1f} GiB in use."
        )
    return f"the device's memory does not suffice ({wanted}).{there} {_ADVICE}"
