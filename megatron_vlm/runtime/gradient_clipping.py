"""Gradient norm and clipping in a few operations, for megatron-core without Apex and Transformer Engine.

Its own functions launch kernels for each gradient, and wait for the device once per gradient to read its norm.
"""

from __future__ import annotations

from typing import Any

import torch


def l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """The L2 norm of all tensors together, [1] on their device, like Apex's `multi_tensor_l2norm`."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.stack(norms).norm().float().view(1), None


def scale_in_place(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Scale gradients like Apex's `multi_tensor_scale`, of which clipping needs one case: target and source the same.

    Args:
        chunk_size: not used.
        noop_flag: not used.
        tensor_lists: sources and targets.
        scale: factor.
    """
    sources, targets = tensor_lists
    assert all(source is target for source, target in zip(sources, targets, strict=True))
    torch._foreach_mul_(targets, scale)


def install_gradient_clipping() -> None:
    """Make megatron-core use these functions where neither Apex nor Transformer Engine is installed, on GPUs too."""
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core import utils

    clipping: Any = clip_grads
    if clipping.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clipping.l2_norm_impl, clipping.multi_tensor_scale_impl = l2_norm, scale_in_place
