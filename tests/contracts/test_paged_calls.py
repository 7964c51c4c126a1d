"""Kernels of the paged cache are called as the published sources have it, and mean the same by every argument."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.config import Recipe
from megatron_vlm.inference import paged_kernels
from megatron_vlm.inference.paged_kernels import StepSequences, paged_kernel
from megatron_vlm.model.layers import attention_kernels
from megatron_vlm.model.layers.attention_backend import Attention
from megatron_vlm.model.layers.packed_sequence import PackedSequence
from tests.contracts import signatures
from tests.contracts.signatures import Published, with_signature
from tests.inference.paged_reference import packed_attention, paged_attention

_VARLEN = varlen.varlen_attn
LENGTHS = {"prefill": ([5, 3], [5, 3]), "decode": ([1, 1, 1], [7, 1, 12]), "both": ([1, 6, 2, 1], [9, 10, 2, 1])}
"""New tokens and all tokens of each request."""


def _sequences(new: list[int], lengths: list[int], block_size: int) -> StepSequences:
    """Blocks in a random order."""
    blocks = [-(-length // block_size) for length in lengths]
    table = torch.zeros(len(new), max(blocks), dtype=torch.int32)
    order = (1 + torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0))).int()
    for row, own in enumerate(order.split(blocks)):
        table[row, : len(own)] = own

    def cumulative(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int()

    return StepSequences(
        cumulative(new), torch.tensor(lengths).int(), cumulative(lengths), table, max(new), max(lengths)
    )


def _checked(a: dict[str, Any], lengths: torch.Tensor, table: torch.Tensor, max_seqlen_kv: int) -> torch.Tensor:
    """What both functions document for a packed query and blocks of keys and values."""
    query, cu_seqlens_q = a["q"], a["cu_seqlens_q"]
    assert query.is_contiguous() and a["causal"] and a["window_size"] == (-1, -1)
    for integers in (lengths, table, cu_seqlens_q):
        assert integers.dtype == torch.int32 and integers.stride(-1) == 1
    new = cu_seqlens_q.diff()
    assert a["max_seqlen_q"] >= int(new.max()) and max_seqlen_kv >= int(lengths.max())
    assert cu_seqlens_q[-1] == len(query) and len(table) == len(lengths) == len(new)
    cu_seqlens_kv = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()])
    keys, values = (a["k_cache"], a["v_cache"]) if "k_cache" in a else (a["k"], a["v"])
    sequences = StepSequences(cu_seqlens_q, lengths, cu_seqlens_kv, table, a["max_seqlen_q"], max_seqlen_kv)
    scale = a["softmax_scale"]
    assert scale is None
    return paged_attention(query, keys, values, sequences)


def flash_attn_3(a: dict[str, Any]) -> torch.Tensor:
    """flash_attn_with_kvcache: `cache_seqlens` are the lengths of the cache, which has the new tokens already."""
    passed = {name for name, value in a.items() if value is not None}
    assert not passed & {"k", "v", "qv", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad"}
    assert not a["return_softmax_lse"] and a["attention_chunk"] == 0 and a["softcap"] == 0
    table = a["page_table"]
    return _checked(a, a["cache_seqlens"], table, table.shape[1] * a["k_cache"].shape[1])


def flash_attn_2(a: dict[str, Any]) -> torch.Tensor:
    """flash_attn_varlen_func with a block table: keys and values are blocks, and cu_seqlens_k has their lengths."""
    assert a["k"].shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert a["dropout_p"] == 0 and not a["return_attn_probs"] and a["alibi_slopes"] is None
    assert a["cu_seqlens_k"].dtype == torch.int32
    return _checked(a, a["cu_seqlens_k"].diff(), a["block_table"], a["max_seqlen_k"])


CASES: list[tuple[str, str, Published, Any, int]] = [
    ("flash_attn_3", "flash_attn_interface", signatures.FLASH_ATTN_3_CACHE[0], flash_attn_3, 4),
    ("flash_attn_2", "flash_attn", signatures.FLASH_ATTN_2[0], flash_attn_2, 256),
]


def _choose(monkeypatch: pytest.MonkeyPatch, backend: str, block_size: int) -> paged_kernels.PagedKernel | None:
    monkeypatch.setattr(paged_kernels, "choose_attention", lambda *_: Attention(backend, ""))  # type: ignore[arg-type]
    return paged_kernel(Recipe(), block_size)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("new", "lengths"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("returns_more", [False, True], ids=["output", "output and log-sum-exp"])
@pytest.mark.parametrize(("backend", "module", "published", "function", "block_size"), CASES, ids=[c[0] for c in CASES])
def test_blocks_are_read_in_place(
    monkeypatch: pytest.MonkeyPatch, backend: str, module: str, published: Published, function: Any, block_size: int,
    returns_more: bool, new: list[int], lengths: list[int],
) -> None:  # fmt: skip
    def call(a: dict[str, Any]) -> Any:
        return (function(a), torch.zeros(1)) if returns_more else function(a)

    _module(monkeypatch, module, **{published.name: with_signature(published, call)})
    kernel = _choose(monkeypatch, backend, block_size)
    assert kernel is not None and kernel.reads_blocks
    sequences = _sequences(new, lengths, block_size)
    blocks = int(sequences.block_table.max()) + 1
    query = torch.randn(sum(new), 4, 8)
    keys, values = torch.randn(2, blocks, block_size, 2, 8)
    out = kernel.attend(query, keys, values, sequences)
    torch.testing.assert_close(out, paged_attention(query, keys, values, sequences))


def _of_packed_rows(a: dict[str, Any]) -> torch.Tensor:
    """flash_attn_varlen_func of flash-attn and aiter, where a request has more keys than queries."""
    assert a["causal"] and a["window_size"][:2] == (-1, -1) and a.get("dropout_p", 0.0) == 0.0
    packed = PackedSequence(
        qkv_format="thd", cu_seqlens_q=a["cu_seqlens_q"], cu_seqlens_kv=a["cu_seqlens_k"],
        max_seqlen_q=a["max_seqlen_q"], max_seqlen_kv=a["max_seqlen_k"],
    )  # fmt: skip
    return packed_attention(a["q"], a["k"], a["v"], packed, a["softmax_scale"])


def _torch_varlen(*args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's own function, whose causal mask is a window."""
    a = inspect.signature(_VARLEN).bind(*args, **kwargs).arguments
    assert a["window_size"] == (-1, 0) and a.get("enable_gqa", False) == (a["query"].shape[1] != a["key"].shape[1])
    packed = PackedSequence(
        qkv_format="thd", cu_seqlens_q=a["cu_seq_q"], cu_seqlens_kv=a["cu_seq_k"],
        max_seqlen_q=a["max_q"], max_seqlen_kv=a["max_k"],
    )  # fmt: skip
    return packed_attention(a["query"], a["key"], a["value"], packed, a["scale"])


@pytest.mark.parametrize(("new", "lengths"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn_2", "flash_attn_3", "aiter"])
def test_blocks_are_copied(monkeypatch: pytest.MonkeyPatch, backend: str, new: list[int], lengths: list[int]) -> None:
    packages = {
        "flash_attn_2": ("flash_attn", signatures.FLASH_ATTN_2[0]),
        "flash_attn_3": ("flash_attn_interface", signatures.FLASH_ATTN_3[0]),
        "aiter": ("aiter", signatures.AITER[0]),
    }
    if backend in packages:
        module, published = packages[backend]
        _module(monkeypatch, module, flash_attn_varlen_func=with_signature(published, _of_packed_rows))
    else:
        monkeypatch.setattr(varlen, "varlen_attn", _torch_varlen)
        parameters = frozenset(inspect.signature(_VARLEN).parameters)
        monkeypatch.setattr(attention_kernels, "torch_varlen_parameters", lambda: parameters)
    kernel = _choose(monkeypatch, backend, 4)
    assert kernel is not None and not kernel.reads_blocks
    sequences = _sequences(new, lengths, 4)
    sequences.slots = torch.cat(
        [
            (4 * blocks[:, None] + torch.arange(4)).flatten()[:length]
            for blocks, length in zip(sequences.block_table.long(), lengths, strict=True)
        ]
    )
    query = torch.randn(sum(new), 4, 8)
    keys, values = torch.randn(2, int(sequences.block_table.max()) + 1, 4, 2, 8)
    out = kernel.attend(query, keys, values, sequences)
    torch.testing.assert_close(out, paged_attention(query, keys, values, sequences))


def test_which_kernels_read_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, block_size in (("torch_varlen", 256), ("aiter", 256), ("flash_attn_2", 64)):
        kernel = _choose(monkeypatch, backend, block_size)
        assert kernel is not None and not kernel.reads_blocks, backend
    _module(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=None)  # a build without the function for caches
    kernel = _choose(monkeypatch, "flash_attn_3", 64)
    assert kernel is not None and not kernel.reads_blocks
    for backend in ("sdpa", "transformer_engine"):
        assert _choose(monkeypatch, backend, 256) is None
    monkeypatch.setattr(paged_kernels, "device_kind", lambda: "rocm")
    assert _choose(monkeypatch, "torch_varlen", 256) is None
    assert _choose(monkeypatch, "flash_attn_2", 256) is not None
