"""Document boundaries of a packed row: built once per micro-batch, read by the attention of every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

LONG_DOCUMENT = 1024
"""Documents of at least this many tokens get a call of their own: padding them would cost more than a kernel launch."""
MIN_LENGTH_RATIO = 0.8
"""A document joins a group if it has at least this fraction of the longest member's length; this bounds the padding."""


@dataclass
class DocumentGroup:
    """Documents that are attended in one call, as a padded [count, length] batch.

    `gather` [count * length] holds the row positions of the batch's tokens; None if they are contiguous from `start`.
    `real` holds the indices of the batch's tokens that are not padding; None if there is no padding.
    """

    count: int
    length: int
    start: int
    gather: torch.Tensor | None = None
    real: torch.Tensor | None = None


@dataclass
class PackedSequence(PackedSeqParams):
    """What attention needs to know about a packed row. megatron-core passes it to every layer as packed_seq_params."""

    cu_seqlens: list[int] = field(default_factory=list)
    """Document boundaries on the host: first 0, last the row's length."""
    causal: bool = True
    cos: torch.Tensor | None = None
    """[S, 1, head_dim / 2] float32 rotary tables of the whole row; None in the vision tower, which learns positions."""
    sin: torch.Tensor | None = None
    groups: list[DocumentGroup] = field(default_factory=list)
    restore: torch.Tensor | None = None
    """[S] permutes the concatenated outputs of the groups to the row's order; None if they are in order."""
    cache: Any = None
    """A key/value cache (inference.kv_cache.PagedKVCache) whose `attend` replaces the kernel during generation."""


def packed_sequence(
    cu_seqlens: list[int],
    *,
    causal: bool,
    device: torch.device,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    cache: Any = None,
) -> PackedSequence:
    """Describe a row of S tokens whose documents are bounded by `cu_seqlens`: first 0, last S.

    cos and sin [S, 1, head_dim / 2] come from `rotary_tables`; `cache` is a PagedKVCache during generation.
    """
    cumulative = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False))
    groups, restore = _group_documents(cu_seqlens, causal, device)
    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cu_seqlens=cu_seqlens,
        causal=causal,
        cos=cos,
        sin=sin,
        groups=groups,
        restore=restore,
        cache=cache,
    )


def _group_documents(
    cu_seqlens: list[int], causal: bool, device: torch.device
) -> tuple[list[DocumentGroup], torch.Tensor | None]:
    """Group documents of similar length; returns the groups and PackedSequence.restore.

    With a causal mask no token attends to the padding on its right, so groups may be padded. Without one, only
    documents of equal length are grouped.
    """
    documents = sorted(
        ((start, end - start) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)),
        key=lambda d: (-d[1], d[0]),
    )
    members: list[list[tuple[int, int]]] = []
    for start, length in documents:
        longest = members[-1][0][1] if members else 0
        minimum = MIN_LENGTH_RATIO * longest if causal else longest
        if members and longest < LONG_DOCUMENT and length >= minimum and length <= longest:
            members[-1].append((start, length))
        else:
            members.append([(start, length)])
    for group in members:
        group.sort()
    members.sort()
    groups = [_pad_group(group, device) for group in members]
    order = torch.cat([torch.arange(start, start + length) for group in members for start, length in group])
    in_order = bool((order[1:] > order[:-1]).all())
    return groups, None if in_order else torch.argsort(order).to(device)


def _pad_group(group: list[tuple[int, int]], device: torch.device) -> DocumentGroup:
    count, longest = len(group), max(length for _, length in group)
    starts = torch.tensor([start for start, _ in group])
    lengths = torch.tensor([length for _, length in group])
    if bool((lengths == longest).all()) and bool((starts == starts[0] + longest * torch.arange(count)).all()):
        return DocumentGroup(count, longest, group[0][0])
    positions = torch.arange(longest)
    # Padding repeats the document's last token: no real token attends to it, and no other document is read.
    gather = starts[:, None] + torch.minimum(positions[None], lengths[:, None] - 1)
    real = (positions[None] < lengths[:, None]).flatten().nonzero()[:, 0]
    return DocumentGroup(
        count,
        longest,
        group[0][0],
        gather=gather.flatten().to(device),
        real=None if len(real) == count * longest else real.to(device),
    )


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cos and sin, [S, 1, head_dim / 2] float32, for positions [S] (RoFormer, arXiv:2104.09864)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None, None] * inverse
    return angles.cos(), angles.sin()
