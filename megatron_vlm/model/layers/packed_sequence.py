"""What attention needs to know about a packed row; megatron-core passes it to every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_vlm.data.rows.document_layout import DocumentGroup, DocumentLayout


@dataclass
class PackedSequence(PackedSeqParams):
    """The documents of a row, on the device, and its rotary tables. megatron-core's argument packed_seq_params."""

    causal: bool = True
    cos: torch.Tensor | None = None
    """[S, 1, head_dim / 2] float32 rotary tables of the whole row; None in the vision tower, which learns positions."""
    sin: torch.Tensor | None = None
    groups: list[DocumentGroup] = field(default_factory=list)
    """For kernels that read them, as in DocumentLayout."""
    restore: torch.Tensor | None = None
    """As in DocumentLayout."""
    cache: Any = None
    """A key/value cache (inference.kv_cache.PagedKVCache) whose `attend` replaces the kernel during generation."""


def packed_sequence(
    layout: DocumentLayout,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    cache: Any = None,
) -> PackedSequence:
    """Describe a row of S tokens to attention.

    Args:
        layout: of the row's documents, on the device.
        cos: [S, 1, head_dim / 2], from `rotary_tables`.
        sin: likewise.
        cache: a PagedKVCache during generation.
    """
    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_kv=layout.cu_seqlens,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_kv=layout.max_seqlen,
        causal=layout.causal,
        cos=cos,
        sin=sin,
        groups=layout.groups,
        restore=layout.restore,
        cache=cache,
    )


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cos and sin, [S, 1, head_dim / 2] float32, for positions [S] (RoFormer, arXiv:2104.09864)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None, None] * inverse
    return angles.cos(), angles.sin()
