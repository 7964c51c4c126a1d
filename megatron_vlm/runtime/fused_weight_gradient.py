"""Weight gradients accumulated into fp32 by the matrix product itself, in megatron-core's linear layers too.

Otherwise each product writes a bf16 gradient, which is then read, converted and added to the fp32 gradient buffer.
megatron-core does this with a CUDA extension (`gradient_accumulation_fusion`); where that is not installed, torch's
`addmm` with an fp32 output takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel import layers

from megatron_vlm.runtime.device import current_device


def multiply_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool) -> None:
    """out = left @ right, or with `add` out += left @ right, in fp32; factors that are not fp32 need `is_supported`."""
    dtype = {} if left.dtype == out.dtype else {"out_dtype": torch.float32}
    torch.addmm(out, left, right, beta=float(add), out=out, **dtype)  # type: ignore[call-overload]


def accumulate_weight_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_output [n, out]^T inputs [n, in], in place; main_grad is fp32."""
    multiply_into(main_grad, grad_output.t(), inputs, add=True)


class _TorchExtension:
    """Has the function of the extension fused_weight_gradient_mlp_cuda that fp32 gradient buffers need."""

    wgrad_gemm_accum_fp32 = staticmethod(accumulate_weight_gradient)


@functools.cache
def is_supported(dtype: torch.dtype) -> bool:
    """Whether this torch multiplies matrices of `dtype` into fp32 on this device (from 2.11 on, on GPUs)."""
    main_grad = torch.zeros(8, 8, device=current_device())
    factor = main_grad.to(dtype)
    try:
        accumulate_weight_gradient(factor, factor, main_grad)
    except (TypeError, RuntimeError):  # no such argument, or not on this device
        return False
    return True


def fuse_weight_gradients(chunks: Iterable[torch.nn.Module], dtype: torch.dtype) -> bool:
    """Let the linear layers of model chunks accumulate into `main_grad`, which DDP must have set before.

    Transformer Engine's can by themselves. Returns whether megatron-core's do: not if neither the extension nor this
    torch can.
    """
    fused = layers._grad_accum_fusion_available
    if not fused and is_supported(dtype):
        layers.fused_weight_gradient_mlp_cuda = _TorchExtension
        fused = True
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
                module.gradient_accumulation_fusion = fused
            elif hasattr(module, "fuse_wgrad_accumulation"):
                setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010  (of Transformer Engine: no type)
    return fused
