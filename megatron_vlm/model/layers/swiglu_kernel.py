"""The gradient of SwiGLU as a Triton kernel.

On one H200 torch.compile's took 1.18 ms for a row of the reference recipe, because it computes both halves of the
gradient for every element; reading and writing the data takes 0.62 ms. Liger's needs gate and up in tensors of their
own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def triton_swiglu_backward(gradient, gate_up, output, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    half = row * 2 * width + column
    upstream = tl.load(gradient + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + half, mask=inside).to(tl.float32)
    up = tl.load(gate_up + half + width, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(output + half, upstream * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(output + half + width, upstream * silu, mask=inside)


def swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The gradient of `gate_up` [..., 2 n] from that of the output [..., n], computed in fp32."""
    gradient, gate_up = gradient.contiguous(), gate_up.contiguous()
    output, width = torch.empty_like(gate_up), gradient.shape[-1]
    rows = gradient.numel() // width
    if rows:
        triton_swiglu_backward[(rows, triton.cdiv(width, _BLOCK))](gradient, gate_up, output, width, BLOCK=_BLOCK)
    return output
