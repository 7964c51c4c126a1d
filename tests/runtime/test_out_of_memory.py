"""Out-of-memory errors are recognised and described, whichever library raises them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory

TORCH = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
    "free. Process 1 has 78.08 GiB memory in use."
)
NCCL = dist.DistBackendError(  # from NCCL 2.28 on an H100 whose memory torch had reserved
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nFailed to CUDA calloc async 4 bytes"
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
DRIVER = RuntimeError(
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TORCH, "Tried to allocate 2.00 GiB"),
        (NCCL, "Failed to CUDA calloc async 4 bytes"),
        (CUBLAS, "CUBLAS_STATUS_ALLOC_FAILED"),
        (DRIVER, "CUDA error: out of memory"),
    ],
)
def test_the_message_has_the_request_and_advice(error: RuntimeError, expected: str) -> None:
    assert is_out_of_memory(error)
    message = describe_out_of_memory(error)
    assert expected in message and "recompute_granularity: full" in message and "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
    ],
)
def test_other_errors_are_not_recognised(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_training_ends_with_the_message_alone() -> None:
    script = f"import torch, megatron_vlm.train as t; t._fail(torch.OutOfMemoryError({str(TORCH)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "[rank 0] out of device memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in done.stderr
    assert "Traceback" not in done.stderr
