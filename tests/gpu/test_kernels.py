"""GPU kernels equal CPU kernels: attention at real lengths, and normalised pixels bit for bit."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

BF16 = 1e-2
"""Relative to a tensor's norm: bf16, which the kernel also uses for the probabilities, has 8 bits of precision."""


def _cu_seqlens(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def _available(head_dim: int) -> list[str]:
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.model.layers.attention_backend import PREFERRED, why_not
    from megatron_vlm.runtime.device import device_kind

    return [name for name in PREFERRED[device_kind()] if why_not(name, torch.bfloat16, head_dim) is None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 128), (16, 16, 64), (12, 4, 64), (16, 4, 80)])
@pytest.mark.parametrize(
    "lengths",
    [[577] * 8, [1, 3000, 257, 2, 4933, 64], [8193], [1] * 300],
    ids=["tiles", "mixed", "one", "one-token documents"],
)
def test_every_backend_of_this_machine(lengths: list[int], heads: int, kv_heads: int, width: int, causal: bool) -> None:
    """Against SDPA of each document in fp32; outputs and all three gradients."""
    backends = _available(width)
    from megatron_vlm.data.rows.document_layout import document_layout
    from megatron_vlm.model.layers.attention_backend import Attention
    from megatron_vlm.model.layers.attention_kernels import sdpa
    from megatron_vlm.model.layers.packed_sequence import packed_sequence

    cu_seqlens = _cu_seqlens(lengths)
    packed = packed_sequence(document_layout(cu_seqlens, causal=causal, grouped=True).to(torch.device("cuda")))
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(cu_seqlens[-1], count, width, device="cuda", generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    full = [x.detach().float().requires_grad_() for x in half]
    expected = sdpa(*full, packed)
    reference = [expected, *torch.autograd.grad(expected, full, upstream.bfloat16().float())]
    assert len(backends) > 1, f"only {backends} work on this machine"
    for backend in backends:
        out = Attention(backend, "").kernel(*half, packed)  # type: ignore[arg-type]
        actual = [out, *torch.autograd.grad(out, half, upstream.bfloat16())]
        for name, ours, theirs in zip(("output", "dq", "dk", "dv"), actual, reference, strict=True):
            norm = float(theirs.detach().norm())
            difference = float((ours.detach().float() - theirs.detach()).norm())
            # One-token documents have no gradient of query and key: theirs is rounding.
            assert difference < BF16 * norm + 1e-3 * len(lengths) ** 0.5, (backend, name, difference, norm)


def test_pixels_are_normalised_to_the_same_bits() -> None:
    from megatron_vlm.data.processing.tiling import CLIP_MEAN, CLIP_STD, normalise_tiles

    pixels = torch.arange(256, dtype=torch.uint8).repeat(3 * 4).view(4, 3, 16, 16)
    on_gpu = normalise_tiles(pixels.cuda(), CLIP_MEAN, CLIP_STD)
    assert torch.equal(on_gpu.cpu(), normalise_tiles(pixels, CLIP_MEAN, CLIP_STD))


def test_any_head_dimension_works_in_bf16() -> None:
    """Head dimensions that are not multiples of 8 use SDPA."""
    assert _available(6) == ["sdpa"]
    from megatron_vlm.data.rows.document_layout import document_layout
    from megatron_vlm.model.layers.attention_kernels import sdpa
    from megatron_vlm.model.layers.packed_sequence import packed_sequence

    layout = document_layout(_cu_seqlens([3, 40, 7]), causal=True, grouped=True).to(torch.device("cuda"))
    packed = packed_sequence(layout)
    q, k, v = (torch.randn(50, heads, 6, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    expected = sdpa(q.float(), k.float(), v.float(), packed)
    assert float((sdpa(q, k, v, packed).float() - expected).norm() / expected.norm()) < BF16
