"""Peaks of known devices, by the names that torch gives them, and a measured product."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.runtime.peak_rate import datasheet_peak, measured_gemm_rate


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("CPU", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_by_name(name: str, tera: float | None) -> None:
    assert datasheet_peak(name) == (None if tera is None else tera * 1e12)


def test_the_measured_rate_is_that_of_a_product() -> None:
    state = torch.random.get_rng_state()
    assert 1e8 < measured_gemm_rate(torch.float32) < 1e14
    assert torch.equal(state, torch.random.get_rng_state()), "random numbers of the run stay as they are"
