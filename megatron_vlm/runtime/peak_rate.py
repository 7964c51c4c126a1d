"""How fast a device could compute: the peak of its datasheet, and a large matrix product measured here."""

from __future__ import annotations

import statistics
import time

import torch

from megatron_vlm.runtime.device import current_device, on_gpu

_DATASHEET: tuple[tuple[str, float], ...] = (
    ("MI355X", 2500e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
)
"""Part of the device's name -> dense bf16 FLOP/s, without sparsity, of AMD's and NVIDIA's datasheets; the first match
counts.
"""
_GEMM = {True: (8192, 30, 10), False: (256, 8, 3)}
"""Rows and columns of the matrices, number of products, and how many of them only warm up; on a GPU and on a CPU."""


def datasheet_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, by its name as torch gives it; None where it is not known."""
    return next((peak for name, peak in _DATASHEET if name in device_name), None)


def measured_gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on random numbers, on this process's device. Takes a tenth of a second."""
    size, runs, warm_up = _GEMM[on_gpu()]
    generator = torch.Generator(current_device()).manual_seed(0)
    a, b = (torch.randn(size, size, device=current_device(), generator=generator).to(dtype) for _ in range(2))
    times = [_seconds(a, b) for _ in range(runs)]
    return 2.0 * size**3 / statistics.median(times[warm_up:])


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if on_gpu():
        torch.cuda.synchronize()
    started = time.perf_counter()
    a @ b
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - started
