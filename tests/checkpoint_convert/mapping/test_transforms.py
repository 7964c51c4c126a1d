import torch

from checkpoint_convert.mapping.transforms import Copy, InterleaveQKV, StackGateUp


def test_qkv_rows_lie_group_by_group() -> None:
    q, k, v = (torch.arange(8) + 100, torch.arange(4) + 200, torch.arange(4) + 300)  # 4 heads, 2 groups, head_dim 2
    made = InterleaveQKV(heads=4, groups=2).to_megatron([q, k, v])
    first = [100, 101, 102, 103, 200, 201, 300, 301]
    second = [104, 105, 106, 107, 202, 203, 302, 303]
    assert made.tolist() == first + second


def test_every_rule_is_exact_in_both_directions() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(torch.bfloat16)

    cases = [
        (Copy(), [draw(5, 3)]),
        (StackGateUp(), [draw(7, 3), draw(7, 3)]),
        (InterleaveQKV(6, 6), [draw(48, 5), draw(48, 5), draw(48, 5)]),
        (InterleaveQKV(6, 2), [draw(48, 5), draw(16, 5), draw(16, 5)]),
        (InterleaveQKV(6, 1), [draw(48), draw(8), draw(8)]),
    ]
    for rule, tensors in cases:
        back = rule.to_hf(rule.to_megatron(tensors))
        assert len(back) == len(tensors)
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(tensors, back, strict=True)), rule
