"""Attention of all requests of a step in one kernel call, over the paged key/value cache. On GPUs.

    query [s, h, d], keys and values [blocks, block size, kv, d] of the cache -> [s, h, d]

The new tokens of a request are the last of its cached ones, so the causal mask is aligned to the bottom right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_vlm.config import Recipe
from megatron_vlm.config.training import AttentionBackend
from megatron_vlm.model.layers.attention_backend import Attention, choose_attention
from megatron_vlm.model.layers.attention_kernels import Kernel, flash_attention, without_log_sum_exp
from megatron_vlm.model.layers.packed_sequence import PackedSequence
from megatron_vlm.runtime.device import device_kind

_FLASH_ATTN_2_BLOCK = 256
"""It reads blocks of multiples of this size; FlashAttention-3 reads any."""


@dataclass
class StepSequences:
    """The n requests of a step, whose tokens are one after the other in its row; tensors are int32 on the device."""

    cu_seqlens_q: torch.Tensor
    """[n + 1], cumulative numbers of new tokens."""
    lengths: torch.Tensor
    """[n], cached tokens, the new ones included."""
    cu_seqlens_kv: torch.Tensor
    """[n + 1], cumulative lengths."""
    block_table: torch.Tensor
    """[n, w], the blocks of each request; padded with block 0."""
    max_seqlen_q: int
    max_seqlen_kv: int
    """The greatest length, or more."""
    slots: torch.Tensor | None = None
    """[sum of the lengths] int64, where the tokens of all requests are in the cache, for kernels that do not read
    blocks."""


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, StepSequences], torch.Tensor]


@dataclass(frozen=True)
class PagedKernel:
    """A kernel and what it can be used for."""

    attend: Attend
    reads_blocks: bool
    """It reads the cache by its block table. Otherwise keys and values are copied in each step, and the shapes of the
    step depend on its requests' lengths."""


def paged_kernel(recipe: Recipe, block_size: int) -> PagedKernel | None:
    """The kernel of a recipe's attention backend on this machine.

    None: requests are attended one by one. So it is on a CPU, in fp32, and with a backend that does not say that its
    causal mask is aligned to the bottom right: Transformer Engine's has another name for that one, and on ROCm torch
    passes no alignment to AOTriton.
    """
    backend: AttentionBackend = choose_attention(recipe, "language").backend
    if backend in ("sdpa", "transformer_engine") or (backend == "torch_varlen" and device_kind() == "rocm"):
        return None
    if backend == "flash_attn_3" and _has_flash_attn_with_kvcache():
        return PagedKernel(flash_attn_3, reads_blocks=True)
    if backend == "flash_attn_2" and block_size % _FLASH_ATTN_2_BLOCK == 0:
        return PagedKernel(flash_attn_2, reads_blocks=True)
    return PagedKernel(copying(Attention(backend, "").kernel), reads_blocks=False)


def _has_flash_attn_with_kvcache() -> bool:
    import flash_attn_interface

    return hasattr(flash_attn_interface, "flash_attn_with_kvcache")


def flash_attn_3(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequences: StepSequences
) -> torch.Tensor:
    """FlashAttention-3, built from the folder `hopper` of flash-attn."""
    from flash_attn_interface import flash_attn_with_kvcache

    return without_log_sum_exp(
        flash_attn_with_kvcache(
            query,
            keys,
            values,
            cache_seqlens=sequences.lengths,
            page_table=sequences.block_table,
            cu_seqlens_q=sequences.cu_seqlens_q,
            max_seqlen_q=sequences.max_seqlen_q,
            causal=True,
        )
    )


def flash_attn_2(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequences: StepSequences
) -> torch.Tensor:
    """The package flash-attn; blocks have a multiple of 256 tokens."""
    from flash_attn import flash_attn_varlen_func

    packed = _packed_sequence(sequences)
    return flash_attention(flash_attn_varlen_func, query, keys, values, packed, block_table=sequences.block_table)


def _packed_sequence(sequences: StepSequences) -> PackedSequence:
    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=sequences.cu_seqlens_q,
        cu_seqlens_kv=sequences.cu_seqlens_kv,
        max_seqlen_q=sequences.max_seqlen_q,
        max_seqlen_kv=sequences.max_seqlen_kv,
    )


def copying(kernel: Kernel) -> Attend:
    """A kernel for packed rows, on a copy of the step's keys and values without the gaps of their blocks."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequences: StepSequences) -> torch.Tensor:
        slots = sequences.slots
        assert slots is not None
        return kernel(query, keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots], _packed_sequence(sequences))

    return attend
