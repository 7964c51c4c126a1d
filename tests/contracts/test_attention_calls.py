"""Each attention backend calls its package as the published sources have it, and means the same by every argument.

The packages need a GPU. In their place stand functions with the published signature, which compute what the packages
document: dense attention of each document. So a call with a wrong name, order, mask, scale or shape fails here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.data.rows.document_layout import document_layout
from megatron_vlm.model.layers import attention_kernels as kernels
from megatron_vlm.model.layers.packed_sequence import PackedSequence, packed_sequence
from tests.contracts import signatures
from tests.contracts.signatures import Published, with_signature

LENGTHS = {"packed": [9, 30, 8, 1, 10, 2], "one long": [60], "tiles": [17] * 4, "one-token documents": [1] * 5}
HEADS = {"heads of 64": (4, 4, 64), "grouped query, heads of 80": (4, 2, 80), "heads of 128": (2, 1, 128)}


def dense(q: Any, k: Any, v: Any, cu_seqlens: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """Softmax attention of each document, written out."""
    assert cu_seqlens.dtype == torch.int32
    repeats = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        query, key, value = q[start:end], k[start:end], v[start:end]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = torch.einsum("ihd,jhd->hij", query, key) * (scale or q.shape[2] ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), value))
    return torch.cat(outputs)


def flash_attention(arguments: dict[str, Any]) -> torch.Tensor:
    """What flash_attn_varlen_func of flash-attn and aiter documents."""
    a = arguments
    assert torch.equal(a["cu_seqlens_q"], a["cu_seqlens_k"])
    lengths = a["cu_seqlens_q"].diff()
    assert a["max_seqlen_q"] == a["max_seqlen_k"] == int(lengths.max())
    assert a["window_size"][:2] == (-1, -1) and a.get("dropout_p", 0.0) == 0.0
    assert not a.get("return_attn_probs") and not a.get("return_lse") and a.get("alibi_slopes") is None
    return dense(a["q"], a["k"], a["v"], a["cu_seqlens_q"], a["causal"], a["softmax_scale"])


def dot_product_attention(init: Published, forward: Published) -> type:
    """Transformer Engine's module in the `thd` format, with the checks of its forward."""

    class DotProductAttention:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.settings = with_signature(init, lambda arguments: arguments)(self, *args, **kwargs)
            assert self.settings["attention_dropout"] == 0.0  # otherwise it needs a tracker of random states

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            a = with_signature(forward, lambda arguments: arguments)(self, *args, **kwargs)
            q, k, v = a["query_layer"], a["key_layer"], a["value_layer"]
            assert a["qkv_format"] == "thd" and q.dim() == k.dim() == v.dim() == 3
            assert "padding" in a["attn_mask_type"], "thd accepts padding masks only"
            assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
            settings = self.settings
            assert q.shape[1:] == (settings["num_attention_heads"], settings["kv_channels"])
            assert k.shape[1] == settings["num_gqa_groups"] and settings["tp_size"] == 1
            causal = {"padding": False, "padding_causal": True}[a["attn_mask_type"]]
            out = dense(q, k, v, a["cu_seqlens_q"], causal, settings["softmax_scale"])
            return out.flatten(1)

    return DotProductAttention


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Make `name` importable, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def _run(kernel: kernels.Kernel, lengths: list[int], heads: tuple[int, int, int], causal: bool) -> None:
    """Output and gradients equal those of sdpa, with a scale of its own."""
    query_heads, kv_heads, width = heads
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    generator = torch.Generator().manual_seed(0)
    total = cu_seqlens[-1]
    q, k, v = (
        torch.randn(total, count, width, generator=generator, requires_grad=True)
        for count in (query_heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(total, query_heads, width, generator=generator)
    packed: PackedSequence = packed_sequence(document_layout(cu_seqlens, causal=causal, grouped=True))
    for scale in (None, 0.3):
        out, expected = kernel(q, k, v, packed, scale), kernels.sdpa(q, k, v, packed, scale)
        assert out.shape == (total, query_heads, width)
        torch.testing.assert_close(out, expected)
        actual = torch.autograd.grad(out, (q, k, v), upstream)
        for ours, reference in zip(actual, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


FLASH = [
    *[(published, "flash_attn", kernels.flash_attn_2) for published in signatures.FLASH_ATTN_2],
    *[(published, "flash_attn_interface", kernels.flash_attn_3) for published in signatures.FLASH_ATTN_3],
    *[(published, "aiter", kernels.aiter) for published in signatures.AITER],
]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("published", "module", "kernel"), FLASH, ids=[case[0].id for case in FLASH])
def test_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
    published: Published,
    module: str,
    kernel: kernels.Kernel,
    heads: tuple[int, int, int],
    lengths: list[int],
) -> None:
    _module(monkeypatch, module, flash_attn_varlen_func=with_signature(published, flash_attention))
    for causal in (True, False):
        _run(kernel, lengths, heads, causal)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("init", "forward"), list(zip(signatures.TE_INIT, signatures.TE_FORWARD, strict=True)), ids=["2.11.0", "2.20.2"]
)
def test_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
    init: Published,
    forward: Published,
    heads: tuple[int, int, int],
    lengths: list[int],
) -> None:
    kernels._dot_product_attention.cache_clear()
    _module(monkeypatch, "transformer_engine.pytorch", DotProductAttention=dot_product_attention(init, forward))
    for causal in (True, False):
        _run(kernels.transformer_engine, lengths, heads, causal)
    kernels._dot_product_attention.cache_clear()


def test_a_log_sum_exp_beside_the_output_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of FlashAttention-3 before and after 2.8.3 return both."""
    (published,) = signatures.FLASH_ATTN_3
    both = with_signature(published, lambda arguments: (flash_attention(arguments), torch.zeros(1)))
    _module(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=both)
    _run(kernels.flash_attn_3, [5, 3], (2, 2, 8), True)


def test_a_wrong_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as flash-attn 1, whose lengths had other names."""
    (published,) = signatures.FLASH_ATTN_2
    other = Published(published.package, "1", "", published.name, published.signature.replace("cu_seqlens_k", "cu_k"))
    _module(monkeypatch, "flash_attn", flash_attn_varlen_func=with_signature(other, flash_attention))
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        _run(kernels.flash_attn_2, [5, 3], (2, 2, 8), True)


def test_torchs_own_function_accepts_our_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.attention.varlen of the installed torch, without a GPU: its signature and its argument checks."""
    import inspect

    from torch.nn.attention import varlen

    parameters = inspect.signature(varlen.varlen_attn)

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        a = parameters.bind(*args, **kwargs)
        a.apply_defaults()
        causal = {(-1, 0): True, (-1, -1): False}[a.arguments["window_size"]]
        query, key, value = (a.arguments[name] for name in ("query", "key", "value"))
        assert a.arguments["enable_gqa"] == (query.shape[1] != key.shape[1])
        return dense(query, key, value, a.arguments["cu_seq_q"], causal, a.arguments["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(kernels, "torch_varlen_parameters", lambda: frozenset(parameters.parameters))
    for lengths in LENGTHS.values():
        for heads in HEADS.values():
            for causal in (True, False):
                _run(kernels.torch_varlen, lengths, heads, causal)
