"""Weight gradients accumulated by the matrix product are those that autograd returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from tests.parallel.rows import make_row, tiny_recipe

EQUAL = 1e-6


def test_products_are_added_to_what_is_there() -> None:
    from megatron_vlm.runtime.fused_weight_gradient import accumulate_weight_gradient

    generator = torch.Generator().manual_seed(0)
    inputs, grad, before = (torch.randn(*shape, generator=generator) for shape in ((20, 6), (20, 8), (8, 6)))
    main_grad = before.clone()
    accumulate_weight_gradient(inputs, grad, main_grad)
    torch.testing.assert_close(main_grad, before + grad.t() @ inputs)


def _main_grads(monkeypatch: pytest.MonkeyPatch, fused: bool, **training: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradient buffers after a step of two rows, by parameter name, and the number of fused products."""
    from megatron.core.tensor_parallel import layers

    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights
    from megatron_vlm.runtime import fused_weight_gradient
    from megatron_vlm.training import optimizer
    from megatron_vlm.training.step import forward_backward

    calls = []
    extension = type("Counting", (), {})()
    extension.wgrad_gemm_accum_fp32 = lambda *tensors: (
        calls.append(1),
        fused_weight_gradient.accumulate_weight_gradient(*tensors),
    )
    monkeypatch.setattr(fused_weight_gradient, "_TorchExtension", extension)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    if not fused:
        monkeypatch.setattr(optimizer, "fuse_weight_gradients", lambda chunks, dtype: False)
    recipe = tiny_recipe(ParallelConfig(), **training)
    recipe.training.global_batch_size = 2
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    wrapped = optimizer.wrap_for_data_parallel(chunks, recipe)
    forward_backward(wrapped, [iter([make_row(0), make_row(2)])], recipe)
    monkeypatch.undo()
    named = chunks[0].named_parameters()
    return {name: parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad}, len(calls)


@pytest.mark.parametrize("training", [{}, {"recompute_granularity": "full"}, {"trainable": ["language"]}])
def test_a_step_has_the_gradients_of_autograd(
    one_process: None, monkeypatch: pytest.MonkeyPatch, training: dict[str, Any]
) -> None:
    expected, none = _main_grads(monkeypatch, False, **training)
    gradients, products = _main_grads(monkeypatch, True, **training)
    layers = 4 + (0 if "trainable" in training else 2)  # of the decoder and the tower, 4 linear layers each, 2 rows
    assert (none, products) == (0, layers * 4 * 2)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= EQUAL * float(expected[name].norm()), name


def test_a_torch_without_it_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.runtime import fused_weight_gradient

    def older_torch(*_: Any, **__: Any) -> None:
        raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")

    monkeypatch.setattr(torch, "addmm", older_torch)
    assert not fused_weight_gradient.is_supported(torch.bfloat16)
    assert fused_weight_gradient.is_supported(torch.float32)
    assert not fused_weight_gradient.fuse_weight_gradients([], torch.bfloat16)
