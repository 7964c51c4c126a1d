"""Rotary embedding of query and key (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import torch

from megatron_vlm.runtime.device import fused


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Of x [..., h, d] in fp32, with cos and sin [..., 1, d / 2]. Halves are paired as in transformers."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@fused
def rotate_both(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` of query and key."""
    return rotate(query, cos, sin), rotate(key, cos, sin)
