"""SwiGLU (Shazeer, arXiv:2002.05202) of a fused gate and up projection: silu(gate) * up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_vlm.runtime.device import fused, on_gpu


@fused
def _forward(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone, and writes both halves of its gradient in one pass over the data."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        from megatron_vlm.model.layers.swiglu_kernel import swiglu_backward

        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gradient, gate_up)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 n], gate first -> [..., n]."""
    if on_gpu():
        output: torch.Tensor = _SwiGLU.apply(gate_up)
        return output
    if torch.is_grad_enabled():
        return _forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)  # memory that was just written is in the processor's cache
