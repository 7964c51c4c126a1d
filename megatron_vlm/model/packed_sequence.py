"""How the documents of a row lie, made once per micro-batch and read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

LONG_DOCUMENT = 1024
"""Documents from here on are attended one by one: padding them to a common length would cost more than a launch."""
LEAST_SHARE = 0.8
"""A document joins a group if it is at least this share of the group's longest: it bounds the padded work."""


@dataclass
class DocumentGroup:
    """Documents that are attended in one call, as a [count, length] rectangle.

    `gather` [count * length] picks the rectangle out of the row, None if it lies there as it is, from `start`.
    `real` picks the rectangle's places that are not padding, None if all are real.
    """

    count: int
    length: int
    start: int
    gather: torch.Tensor | None = None
    real: torch.Tensor | None = None


@dataclass
class PackedSequence(PackedSeqParams):
    """What attention must know of a row. megatron-core hands it down as its packed_seq_params."""

    cu_seqlens: list[int] = field(default_factory=list)
    causal: bool = True
    cos: torch.Tensor | None = None
    """[S, 1, head_dim / 2] float32 rotary tables of the whole row, or None where positions are learned."""
    sin: torch.Tensor | None = None
    groups: list[DocumentGroup] = field(default_factory=list)
    restore: torch.Tensor | None = None
    """[S] puts the groups' outputs, laid end to end, back in the row's order; None if they are in order."""
    cache: Any = None
    """A key/value cache that answers in place of the kernel while text is generated."""


def packed_sequence(
    cu_seqlens: list[int],
    *,
    causal: bool,
    device: torch.device,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    cache: Any = None,
) -> PackedSequence:
    """The layout of a row whose documents lie between successive `cu_seqlens` (first 0, last the row's length)."""
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
    """Documents of like length share a rectangle; right padding needs no mask under a causal one.

    Without causality a padded key would be seen, so that only documents of equal length are put together.
    """
    documents = sorted(
        ((start, end - start) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)),
        key=lambda d: (-d[1], d[0]),
    )
    members: list[list[tuple[int, int]]] = []
    for start, length in documents:
        longest = members[-1][0][1] if members else 0
        least = LEAST_SHARE * longest if causal else longest
        if members and longest < LONG_DOCUMENT and length >= least and length <= longest:
            members[-1].append((start, length))
        else:
            members.append([(start, length)])
    for group in members:
        group.sort()
    members.sort()
    groups = [_rectangle(group, device) for group in members]
    order = torch.cat([torch.arange(start, start + length) for group in members for start, length in group])
    in_order = bool((order[1:] > order[:-1]).all())
    return groups, None if in_order else torch.argsort(order).to(device)


def _rectangle(group: list[tuple[int, int]], device: torch.device) -> DocumentGroup:
    count, longest = len(group), max(length for _, length in group)
    starts = torch.tensor([start for start, _ in group])
    lengths = torch.tensor([length for _, length in group])
    if bool((lengths == longest).all()) and bool((starts == starts[0] + longest * torch.arange(count)).all()):
        return DocumentGroup(count, longest, group[0][0])
    places = torch.arange(longest)
    # a padded place repeats its document's last token: nothing real looks at it, nothing foreign is read
    gather = starts[:, None] + torch.minimum(places[None], lengths[:, None] - 1)
    real = (places[None] < lengths[:, None]).flatten().nonzero()[:, 0]
    return DocumentGroup(
        count,
        longest,
        group[0][0],
        gather=gather.flatten().to(device),
        real=None if len(real) == count * longest else real.to(device),
    )


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, 1, head_dim / 2] float32 of explicit positions [S] (RoFormer, arXiv:2104.09864, by halves)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[:, None, None] * inverse
    return angles.cos(), angles.sin()
