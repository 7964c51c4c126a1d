"""GPU kernels equal CPU kernels: attention at real lengths, and normalised pixels bit for bit."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

BF16 = 1e-2
"""Relative to a tensor's norm: bf16, which the kernel also uses for the probabilities, has 8 bits of precision."""


def _cu_seqlens(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 128), (16, 16, 64), (12, 4, 64)])
@pytest.mark.parametrize("lengths", [[577] * 8, [1, 3000, 257, 2, 4933, 64], [8193]], ids=["tiles", "mixed", "one"])
def test_variable_length_attention(lengths: list[int], heads: int, kv_heads: int, width: int, causal: bool) -> None:
    """Against SDPA of each document in fp32; outputs and all three gradients."""
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.data.document_layout import document_layout
    from megatron_vlm.model.attention_kernels import reads_groups, sdpa, varlen
    from megatron_vlm.model.packed_sequence import packed_sequence

    cu_seqlens = _cu_seqlens(lengths)
    layout = document_layout(cu_seqlens, causal=causal, grouped=True).to(torch.device("cuda"))
    packed = packed_sequence(layout)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(cu_seqlens[-1], count, width, device="cuda", generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    full = [x.detach().float().requires_grad_() for x in half]
    out, expected = varlen(*half, packed), sdpa(*full, packed)
    assert not reads_groups(torch.bfloat16, width), "the model would not use the variable-length kernel"
    actual = [out, *torch.autograd.grad(out, half, upstream.bfloat16())]
    reference = [expected, *torch.autograd.grad(expected, full, upstream.bfloat16().float())]
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, reference, strict=True):
        difference = float((ours.detach().float() - theirs.detach()).norm() / theirs.detach().norm())
        assert difference < BF16, (name, difference)


def test_pixels_are_normalised_to_the_same_bits() -> None:
    from megatron_vlm.data.processing.tiling import CLIP_MEAN, CLIP_STD, normalise_tiles

    pixels = torch.arange(256, dtype=torch.uint8).repeat(3 * 4).view(4, 3, 16, 16)
    on_gpu = normalise_tiles(pixels.cuda(), CLIP_MEAN, CLIP_STD)
    assert torch.equal(on_gpu.cpu(), normalise_tiles(pixels, CLIP_MEAN, CLIP_STD))


def test_any_head_dimension_works_in_bf16() -> None:
    """Head dimensions that are not multiples of 8 use SDPA."""
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.data.document_layout import document_layout
    from megatron_vlm.model.attention_kernels import attend, reads_groups, sdpa
    from megatron_vlm.model.packed_sequence import packed_sequence

    assert reads_groups(torch.bfloat16, 6)
    layout = document_layout(_cu_seqlens([3, 40, 7]), causal=True, grouped=True).to(torch.device("cuda"))
    packed = packed_sequence(layout)
    q, k, v = (torch.randn(50, heads, 6, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    expected = sdpa(q.float(), k.float(), v.float(), packed)
    assert float((attend(q, k, v, packed).float() - expected).norm() / expected.norm()) < BF16
