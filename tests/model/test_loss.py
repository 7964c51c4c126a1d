"""The chunked loss head equals torch's cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.data.rows.batch import IGNORE_INDEX


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_cross_entropy(
    one_process: None, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, frozen: bool
) -> None:
    from megatron.core import parallel_state

    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.model import loss
    from megatron_vlm.model.build import language_transformer_config
    from tests.parallel.rows import tiny_recipe

    generator = torch.Generator().manual_seed(0)
    config = language_transformer_config(tiny_recipe(ParallelConfig()))
    vocab_size = 53
    monkeypatch.setattr(loss, "MAX_LOGITS_PER_CHUNK", chunk_tokens * vocab_size)
    head = loss.LossHead(config, vocab_size, True, parallel_state.get_tensor_model_parallel_group())
    weight = torch.randn(vocab_size, config.hidden_size, generator=generator)
    head.weight.data.copy_(weight)
    head.weight.requires_grad = not frozen
    hidden = torch.randn(40, 1, config.hidden_size, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab_size, (40,), generator=generator)
    labels[torch.rand(40, generator=generator) < 0.5] = IGNORE_INDEX

    supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
    total = head(hidden, supervised, labels[supervised], None)
    (total * 3).backward()
    reference, weight = hidden.detach().clone().requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy(reference[:, 0] @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    (expected * 3).backward()

    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(hidden.grad, reference.grad, rtol=1e-5, atol=1e-5)
    if frozen:
        assert head.weight.grad is None
    else:
        assert torch.allclose(head.weight.grad, weight.grad, rtol=1e-5, atol=1e-4)


def test_a_second_backward_pass_is_an_error(one_process: None) -> None:
    """The first scales the stored gradients in place: a second must not return what is scaled twice."""
    from megatron.core import parallel_state

    from megatron_vlm.model.loss import chunked_cross_entropy

    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    group = parallel_state.get_tensor_model_parallel_group()
    total = chunked_cross_entropy(hidden, weight, torch.arange(5), group)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()
