"""Transforms lay rows out as Megatron's layers expect, and are exact in both directions."""

from __future__ import annotations

import torch

from checkpoint_convert.mapping.transforms import Copy, InterleaveQKV, StackGateUp


def test_qkv_rows_are_ordered_by_query_group() -> None:
    q, k, v = (torch.arange(8) + 100, torch.arange(4) + 200, torch.arange(4) + 300)  # 4 heads, 2 groups, head_dim 2
    fused = InterleaveQKV(heads=4, groups=2).to_megatron([q, k, v])
    first = [100, 101, 102, 103, 200, 201, 300, 301]
    second = [104, 105, 106, 107, 202, 203, 302, 303]
    assert fused.tolist() == first + second


def test_every_transform_is_exact_in_both_directions() -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(torch.bfloat16)

    cases = [
        (Copy(), [random(5, 3)]),
        (StackGateUp(), [random(7, 3), random(7, 3)]),
        (InterleaveQKV(6, 6), [random(48, 5), random(48, 5), random(48, 5)]),
        (InterleaveQKV(6, 2), [random(48, 5), random(16, 5), random(16, 5)]),
        (InterleaveQKV(6, 1), [random(48), random(8), random(8)]),
    ]
    for transform, tensors in cases:
        back = transform.to_hf(transform.to_megatron(tensors))
        assert len(back) == len(tensors)
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(tensors, back, strict=True)), transform
