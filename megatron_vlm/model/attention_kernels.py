"""Attention kernels for packed rows. All have the same signature and compute the same function.

`sdpa` calls torch's scaled_dot_product_attention on groups of documents and runs on every device. `varlen` calls
torch's variable-length attention; it needs a GPU, bf16 or fp16, torch 2.11 and a head dimension divisible by 8.
`attend` uses `varlen` where it is supported. Then a row has no groups.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from megatron_vlm.data.document_layout import DocumentGroup
from megatron_vlm.model.packed_sequence import PackedSequence
from megatron_vlm.runtime.device import on_gpu


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """query [s, h, d], key and value [s, kv, d] of the whole row -> [s, h, d], each document by itself."""
    return (sdpa if packed.groups else varlen)(query, key, value, packed, scale)


def reads_groups(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend` uses `sdpa` on this machine, which reads groups of documents.

    torch's variable-length kernel supports half precision and head dimensions that are multiples of 8.
    """
    half = on_gpu() and dtype in (torch.bfloat16, torch.float16)
    return not (half and head_dim % 8 == 0 and head_dim <= 256 and "window_size" in _varlen_parameters())


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call per group of documents; arguments as in `attend`."""
    key, value = _repeat_heads(query, key, value)
    outputs = [_attend_group(query, key, value, group, packed.causal, scale) for group in packed.groups]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if packed.restore is None else out[packed.restore]


def _attend_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: DocumentGroup, causal: bool, scale: float | None
) -> torch.Tensor:
    size = group.count * group.length

    def padded(x: torch.Tensor) -> torch.Tensor:
        tokens = x[group.start : group.start + size] if group.gather is None else x[group.gather]
        return tokens.view(group.count, group.length, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), is_causal=causal, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if group.real is None else out[group.real]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of the installed torch's varlen_attn (2.13 has more than 2.11); empty where it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's variable-length attention (a flash kernel): one call per row, no padding; arguments as in `attend`."""
    from torch.nn.attention.varlen import varlen_attn

    gqa: dict[str, Any] = {}
    if "enable_gqa" in _varlen_parameters():
        gqa["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = _repeat_heads(query, key, value)
    out = varlen_attn(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0) if packed.causal else (-1, -1),
        **gqa,
    )
    assert isinstance(out, torch.Tensor)
    return out
