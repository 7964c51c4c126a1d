"""Attention kernels for packed rows. All have the same signature and compute the same function.

    query [s, h, d], key and value [s, kv, d] of the whole row -> [s, h, d], each document by itself

`sdpa` runs on every device and in every dtype, on groups of documents. The others need a GPU, half precision and a
package, and read cumulative lengths. `attention_backend` says which one a model part uses.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megatron_vlm.data.rows.document_layout import DocumentGroup
from megatron_vlm.model.layers.packed_sequence import PackedSequence


class Kernel(Protocol):
    """The signature of all kernels; `scale` is that of the scores, 1 / sqrt(d) by default."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSequence,
        scale: float | None = None,
    ) -> torch.Tensor: ...


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call per group of documents."""
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
def torch_varlen_parameters() -> frozenset[str]:
    """Parameters of the installed torch's varlen_attn (2.13 has more than 2.11); empty where it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """torch's variable-length attention: FlashAttention-2 on CUDA, AOTriton or CK on ROCm."""
    from torch.nn.attention.varlen import varlen_attn

    gqa: dict[str, Any] = {}
    if "enable_gqa" in torch_varlen_parameters():
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


def flash_attn_2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """The package flash-attn: CUDA, or Composable Kernel on ROCm."""
    from flash_attn import flash_attn_varlen_func

    return flash_attention(flash_attn_varlen_func, query, key, value, packed, scale)


def flash_attn_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """FlashAttention-3, built from the folder `hopper` of flash-attn."""
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attention(flash_attn_varlen_func, query, key, value, packed, scale)


def aiter(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """AMD's aiter: Composable Kernel and assembly."""
    from aiter import flash_attn_varlen_func

    return flash_attention(flash_attn_varlen_func, query, key, value, packed, scale)


def flash_attention(
    function: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSequence,
    scale: float | None = None,
    **more: Any,
) -> torch.Tensor:
    """flash-attn's interface, which the other packages took over. Fewer key/value heads need no repeating.

    `more` are further arguments of the function.
    """
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_k=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_k=packed.max_seqlen_kv,
        softmax_scale=scale,
        causal=packed.causal,
        **more,
    )
    return without_log_sum_exp(out)


def without_log_sum_exp(result: Any) -> torch.Tensor:
    """The output of a FlashAttention; some versions return the log-sum-exp, too."""
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


def transformer_engine(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """Transformer Engine's DotProductAttention in its packed format: cuDNN, or flash-attn where TE prefers it."""
    module = _dot_product_attention(query.shape[1], key.shape[1], query.shape[2], scale)
    out: torch.Tensor = module(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        qkv_format="thd",
        cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_kv=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_kv,
        attn_mask_type="padding_causal" if packed.causal else "padding",  # thd accepts no other masks
        pad_between_seqs=False,
    )
    return out.view(query.shape)


@functools.cache
def _dot_product_attention(heads: int, kv_heads: int, head_dim: int, scale: float | None) -> Any:
    """One module for all layers: it has no weights, and as a part of the model it would add keys to checkpoints."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
