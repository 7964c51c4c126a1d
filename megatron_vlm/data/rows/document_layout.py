"""Where the documents of a packed row begin and end, and how attention groups them; made where the row is built.

A variable-length kernel reads the cumulative lengths only. Kernels that attend one rectangle at a time read groups of
documents. Making these takes row-long index tensors, so that they are made only for a kernel that reads them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from megatron_vlm.data.rows.tensor_tree import map_leaves

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
class DocumentLayout:
    """The documents of a row of S tokens."""

    cu_seqlens: torch.Tensor
    """[documents + 1] int32: cumulative lengths, from 0 to S."""
    max_seqlen: int
    """Length of the longest document."""
    causal: bool
    groups: list[DocumentGroup] = field(default_factory=list)
    """Empty if the kernel does not read them."""
    restore: torch.Tensor | None = None
    """[S] permutes the concatenated outputs of the groups to the row's order; None if they are in order."""

    def to(self, device: torch.device) -> DocumentLayout:
        """A copy on `device`."""
        return map_leaves(self, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))


def document_layout(cu_seqlens: list[int], *, causal: bool, grouped: bool) -> DocumentLayout:
    """Describe a row whose documents are bounded by `cu_seqlens`: first 0, last the row's length.

    Args:
        cu_seqlens: cumulative lengths.
        causal: whether tokens attend only to themselves and what precedes them.
        grouped: whether to make the groups.
    """
    longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
    layout = DocumentLayout(torch.tensor(cu_seqlens, dtype=torch.int32), longest, causal)
    if grouped:
        layout.groups, layout.restore = _group_documents(cu_seqlens, causal)
    return layout


def _group_documents(cu_seqlens: list[int], causal: bool) -> tuple[list[DocumentGroup], torch.Tensor | None]:
    """Group documents of similar length; returns the groups and DocumentLayout.restore.

    With a causal mask no token attends to the padding on its right, so groups may be padded. Without one, only
    documents of equal length are grouped.
    """
    documents = sorted(
        ((start, end - start) for start, end in itertools.pairwise(cu_seqlens)), key=lambda d: (-d[1], d[0])
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
    groups = [_pad_group(group) for group in members]
    attended = [document for group in members for document in group]
    if attended == sorted(attended):
        return groups, None
    order = torch.cat([torch.arange(start, start + length) for start, length in attended])
    restore = torch.empty_like(order)
    restore[order] = torch.arange(len(order))
    return groups, restore


def _pad_group(group: list[tuple[int, int]]) -> DocumentGroup:
    count, longest = len(group), max(length for _, length in group)
    first = group[0][0]
    if group == [(first + longest * number, longest) for number in range(count)]:
        return DocumentGroup(count, longest, first)
    starts = torch.tensor([start for start, _ in group])
    lengths = torch.tensor([length for _, length in group])
    positions = torch.arange(longest)
    # Padding repeats the document's last token: no real token attends to it, and no other document is read.
    gather = starts[:, None] + torch.minimum(positions[None], lengths[:, None] - 1)
    padded = int(lengths.sum()) < count * longest
    real = (positions[None] < lengths[:, None]).flatten().nonzero()[:, 0] if padded else None
    return DocumentGroup(count, longest, first, gather=gather.flatten(), real=real)
