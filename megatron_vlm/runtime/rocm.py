"""Environment variables that libraries on AMD GPUs need, by architecture."""

from __future__ import annotations

import os

import torch

from megatron_vlm.runtime.device import device_kind

_BY_ARCHITECTURE: dict[str, dict[str, str]] = {
    # MI300X, MI325X. AMD's images set it to 0, for gfx950. With 0, the gradients of Transformer Engine's and aiter's
    # attention are infinite on gfx942 from the first step on (AMD's bare-metal guide of Primus, section 1.6).
    "gfx942": {"NVTE_CK_IS_V3_ATOMIC_FP32": "1", "PRIMUS_TURBO_ATTN_V3_ATOMIC_FP32": "1"},
}


def architecture() -> str | None:
    """Such as gfx942; None without an AMD GPU."""
    if device_kind() != "rocm":
        return None
    name: str = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName
    return name.partition(":")[0]  # gfx942:sramecc+:xnack-


def set_environment() -> dict[str, str]:
    """Set what this process's GPU needs, whatever the image has set, and return it. Libraries read it when they run."""
    variables = _BY_ARCHITECTURE.get(architecture() or "", {})
    os.environ.update(variables)
    return variables
