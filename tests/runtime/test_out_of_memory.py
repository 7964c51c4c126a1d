"""A GPU's memory that does not suffice is told as that, whoever noticed it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.runtime.out_of_memory import describe_shortage, ran_out_of_memory

TORCH = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
    "free. Process 1 has 78.08 GiB memory in use."
)
NCCL = dist.DistBackendError(  # as NCCL 2.28 said it on an H100 whose memory torch held
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nFailed to CUDA calloc async 4 bytes"
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
DRIVER = RuntimeError(
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call"
)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (TORCH, "Tried to allocate 2.00 GiB"),
        (NCCL, "Failed to CUDA calloc async 4 bytes"),
        (CUBLAS, "CUBLAS_STATUS_ALLOC_FAILED"),
        (DRIVER, "CUDA error: out of memory"),
    ],
)
def test_the_message_says_what_was_wanted_and_what_helps(error: RuntimeError, wanted: str) -> None:
    assert ran_out_of_memory(error)
    told = describe_shortage(error)
    assert wanted in told and "recompute_granularity: full" in told and "\n" not in told


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
    ],
)
def test_other_errors_are_not_told_as_it(error: Exception) -> None:
    assert not ran_out_of_memory(error)


def test_training_ends_with_the_message_alone() -> None:
    script = f"import torch, megatron_vlm.train as t; t._fail(torch.OutOfMemoryError({str(TORCH)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        "[rank 0] the device's memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB)" in done.stderr
    )
    assert "Traceback" not in done.stderr
