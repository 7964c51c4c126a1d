"""`split_heads` and its gradient as one Triton kernel, which reads and writes the data once.

Liger's rotary embedding does not split, and Transformer Engine's fused one does not know packed rows.
docs/decisions.md, "Kernels and loss", has the times of this kernel and of torch.compile's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def triton_split_heads(  # type: ignore[no-untyped-def]
    mixed, query, key, value, cos, sin, groups,
    HEADS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program for a token: from `mixed` to query, key and value, or in BACKWARD the reverse.

    HEADS: query heads of a group. HALF: half of a head's width. GROUPS and WIDTH: powers of two that are not smaller
    than `groups` and HALF.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (group < groups) & (column < HALF)
    cosine = tl.load(cos + token * HALF + column, mask=column < HALF)
    sine = tl.load(sin + token * HALF + column, mask=column < HALF)
    if BACKWARD:
        sine = -sine  # the transpose of a rotation is its inverse
    for head in tl.static_range(HEADS + 2):
        in_mixed = mixed + token * groups * (HEADS + 2) * 2 * HALF + (group * (HEADS + 2) + head) * 2 * HALF + column
        if head < HEADS:
            in_part = query + token * groups * HEADS * 2 * HALF + (group * HEADS + head) * 2 * HALF + column
        elif head == HEADS:
            in_part = key + token * groups * 2 * HALF + group * 2 * HALF + column
        else:
            in_part = value + token * groups * 2 * HALF + group * 2 * HALF + column
        source = in_part if BACKWARD else in_mixed
        target = in_mixed if BACKWARD else in_part
        first = tl.load(source, mask=inside)
        second = tl.load(source + HALF, mask=inside)
        if head <= HEADS:
            a, b = first.to(tl.float32), second.to(tl.float32)
            first, second = a * cosine - b * sine, b * cosine + a * sine
        tl.store(target, first, mask=inside)
        tl.store(target + HALF, second, mask=inside)


def _launch(
    mixed: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    backward: bool,
) -> None:
    query, key, value = parts
    groups, half = key.shape[-2], key.shape[-1] // 2
    if len(mixed):
        triton_split_heads[(len(mixed),)](
            mixed, query, key, value, cos, sin, groups,
            HEADS=query.shape[-2] // groups, HALF=half, GROUPS=triton.next_power_of_2(groups),
            WIDTH=triton.next_power_of_2(half), BACKWARD=backward,
        )  # fmt: skip


def split_and_rotate(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `split_heads`; mixed is contiguous."""
    shape = mixed.shape[:-1]
    heads = mixed.shape[-1] // head_dim - 2 * groups
    query, key, value = (mixed.new_empty(*shape, count, head_dim) for count in (heads, groups, groups))
    _launch(mixed, (query, key, value), cos, sin, backward=False)
    return query, key, value


def split_and_rotate_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient of `mixed` from those of query, key and value."""
    parts = query.contiguous(), key.contiguous(), value.contiguous()
    mixed = query.new_empty(*query.shape[:-2], sum(part.shape[-2] for part in parts) * query.shape[-1])
    _launch(mixed, parts, cos, sin, backward=True)
    return mixed
