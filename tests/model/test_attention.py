"""Attention over grouped documents equals dense attention with an explicit mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: list[int], causal: bool) -> torch.Tensor:
    """softmax(q k / sqrt d) v over the whole row with a block-diagonal mask."""
    document = torch.bucketize(torch.arange(len(q)), torch.tensor(cu_seqlens[1:]), right=True)
    mask = document[:, None] == document[None]
    if causal:
        mask &= torch.ones_like(mask).tril()
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask).transpose(0, 1)


LENGTHS = [[30], [5, 5, 5], [9, 30, 8, 1, 10, 2], [7, 1, 7, 1, 7], [1300, 40, 1100, 39, 41]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_grouped_documents_equal_a_masked_row(lengths: list[int], causal: bool, kv_heads: int) -> None:
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.data.rows.document_layout import document_layout
    from megatron_vlm.model.layers.attention_kernels import sdpa
    from megatron_vlm.model.layers.packed_sequence import packed_sequence

    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(cu_seqlens[-1], 4, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(cu_seqlens[-1], kv_heads, 8, generator=generator, requires_grad=True) for _ in range(2))
    packed = packed_sequence(document_layout(cu_seqlens, causal=causal, grouped=True))
    upstream = torch.randn(cu_seqlens[-1], 4, 8, generator=generator)
    out = sdpa(q, k, v, packed)
    expected = _dense(q, k, v, cu_seqlens, causal)
    assert torch.allclose(out, expected, atol=1e-5)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-4)


def test_attention_keeps_no_more_than_query_key_and_value_for_backward(one_process: None) -> None:
    """A slice of qkv as the value would keep all of qkv: twice as much for the language model."""
    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.data.rows.document_layout import document_layout
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.layers.packed_sequence import packed_sequence, rotary_tables
    from tests.parallel.rows import tiny_recipe

    (model,) = build_model(tiny_recipe(ParallelConfig()))
    attention = model.language_model.decoder.layers[0].self_attention
    tokens, language = 30, model.recipe.model.language
    hidden = torch.randn(tokens, 1, language.hidden_size, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(tokens), language.head_width, 1e4)
    layout = document_layout([0, tokens], causal=True, grouped=True)
    others = {x.untyped_storage().data_ptr() for x in [hidden, cos, sin, *attention.parameters()]}
    mixed: list[torch.Tensor] = []
    attention.linear_qkv.register_forward_hook(lambda module, inputs, outputs: mixed.append(outputs[0].detach()))
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(hidden, None, packed_seq_params=packed_sequence(layout, cos=cos, sin=sin))
    (qkv,) = mixed
    assert qkv.untyped_storage().data_ptr() not in storages
    # Query, key, value and output, and the kernel's statistics, which are smaller.
    width = language.num_attention_heads * language.head_width
    assert sum(size for where, size in storages.items() if where not in others) < 5 * tokens * width * 4
