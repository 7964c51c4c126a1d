"""Compare both Triton kernels with torch's own operations, in fp32 and bf16; fails with an AssertionError.

python run_triton_kernels.py cpu|cuda      On a CPU TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from megatron_vlm.model.layers.rotary import rotate
from megatron_vlm.model.layers.split_heads_kernel import split_and_rotate, split_and_rotate_backward
from megatron_vlm.model.layers.swiglu_kernel import swiglu_backward

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of the difference, relative to the norm."""
HEADS = [(16, 1, 128), (2, 4, 80), (3, 2, 12), (1, 1, 64)]
"""Query groups, query heads of each, width of a head."""


def require_equal(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert actual.dtype == dtype and difference < TOLERANCE[dtype], (what, dtype, difference)


def compare_split(groups: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    mixed = torch.randn(9, 1, groups * (heads + 2) * head_dim, device=device).to(dtype).double().requires_grad_()
    angles = 3 * torch.randn(9, 1, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    query, key, value = mixed.unflatten(-1, (groups, -1)).split([heads * head_dim, head_dim, head_dim], dim=-1)
    query = query.flatten(-2).unflatten(-1, (-1, head_dim))
    expected = rotate(query, cos[:, None], sin[:, None]), rotate(key, cos[:, None], sin[:, None]), value
    upstream = [torch.randn(part.shape, device=device).to(dtype) for part in expected]
    (gradient,) = torch.autograd.grad(expected, mixed, [part.double() for part in upstream])
    actual = split_and_rotate(mixed.detach().to(dtype), cos, sin, groups, head_dim)
    for name, ours, theirs in zip(("query", "key", "value"), actual, expected, strict=True):
        require_equal(ours, theirs.detach(), dtype, f"{name} of {groups, heads, head_dim}")
    backward = split_and_rotate_backward(*upstream, cos, sin)
    require_equal(backward, gradient, dtype, f"gradient of {groups, heads, head_dim}")


def compare_swiglu(width: int, dtype: torch.dtype, device: str) -> None:
    gate_up = torch.randn(7, 1, 2 * width, device=device).to(dtype).double().requires_grad_()
    upstream = torch.randn(7, 1, width, device=device).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    (gradient,) = torch.autograd.grad(F.silu(gate) * up, gate_up, upstream.double())
    require_equal(swiglu_backward(upstream, gate_up.detach().to(dtype)), gradient, dtype, f"SwiGLU of {width}")


def main(device: str) -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        for groups, heads, head_dim in HEADS:
            compare_split(groups, heads, head_dim, dtype, device)
        for width in (256, 1500):
            compare_swiglu(width, dtype, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
