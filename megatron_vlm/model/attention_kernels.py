"""The kernels that attention may run on; all take a row and its layout and give the same numbers.

`sdpa` is torch's scaled_dot_product_attention over groups of documents and runs anywhere. `varlen` is torch's
variable-length attention and needs a GPU, half precision, torch 2.11 and heads whose width is a multiple of 8. The
fastest that can run is taken.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from megatron_vlm.model.packed_sequence import DocumentGroup, PackedSequence


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """query [s, h, d], key and value [s, kv, d] over the whole row -> [s, h, d]; each document sees itself alone."""
    return (varlen if _takes_varlen(query) else sdpa)(query, key, value, layout, scale)


def _takes_varlen(query: torch.Tensor) -> bool:
    """Whether torch's kernel serves these heads on this device."""
    width = query.shape[-1]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and width % 8 == 0 and width <= 256 and "window_size" in _varlen_parameters()


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call per group of documents."""
    key, value = _repeat_heads(query, key, value)
    parts = [_attend_group(query, key, value, group, layout.causal, scale) for group in layout.groups]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if layout.restore is None else out[layout.restore]


def _attend_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: DocumentGroup, causal: bool, scale: float | None
) -> torch.Tensor:
    size = group.count * group.length

    def rectangle(x: torch.Tensor) -> torch.Tensor:
        rows = x[group.start : group.start + size] if group.gather is None else x[group.gather]
        return rows.view(group.count, group.length, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        rectangle(query), rectangle(key), rectangle(value), is_causal=causal, scale=scale
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if group.real is None else out[group.real]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """What torch's variable-length attention can be told: none where it is missing, since 2.13 more than in 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's variable-length attention (a flash kernel): one call for the row, no padding."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if "enable_gqa" in _varlen_parameters():
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = _repeat_heads(query, key, value)
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_kv,
        layout.max_seqlen_q,
        layout.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0) if layout.causal else (-1, -1),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out
