"""Environment of AMD GPUs by architecture, over what the image has set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.runtime import rocm

ATOMIC = "NVTE_CK_IS_V3_ATOMIC_FP32"


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("rocm", "gfx942:sramecc+:xnack-", "1"),
        ("rocm", "gfx950:sramecc+:xnack-", "0"),
        ("cuda", "", "0"),
        ("cpu", "", "0"),
    ],
)
def test_gradients_are_accumulated_in_fp32_on_gfx942(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, expected: str
) -> None:
    monkeypatch.setenv(ATOMIC, "0")  # as AMD's images do
    monkeypatch.setenv("PRIMUS_TURBO_ATTN_V3_ATOMIC_FP32", "0")
    monkeypatch.setattr(rocm, "device_kind", lambda: kind)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))
    set_here = rocm.set_environment()
    import os

    assert os.environ[ATOMIC] == expected
    assert (ATOMIC in set_here) == (expected == "1")
    assert rocm.architecture() == (name.partition(":")[0] if kind == "rocm" else None)
