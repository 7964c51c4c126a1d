"""Gradients are measured and clipped as by torch, in the same few operations for any number of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from tests.support.operations import Operations

SHAPES = [(3, 5), (1,), (7,), (2, 3, 4), (300, 20)]


def _parameters(repeat: int = 1) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES * repeat]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def _norm(parameters: list[torch.nn.Parameter], group: Any) -> float:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(get_grad_norm_fp32(gradients, grad_stats_parallel_group=group))


@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_gradients_are_clipped_as_by_torch(one_process: None, limit: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    ours, theirs = _parameters(), _parameters()
    norm = _norm(ours, torch.distributed.group.WORLD)
    clip_grad_by_total_norm_fp32(ours, limit, norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_norm_and_scale_are_the_same_few_operations_for_any_number_of_gradients() -> None:
    """On a GPU each is a launch, and reading a value back waits for the device."""
    from megatron.core.optimizer import clip_grads

    counts = []
    for repeat in (1, 20):
        gradients = [parameter.grad for parameter in _parameters(repeat)]
        flag = torch.zeros(1, dtype=torch.int)
        with Operations() as mode:
            clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, flag, [gradients], False)
            clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, flag, [gradients, gradients], 0.5)
        counts.append(mode.names)
    assert counts[0] == counts[1] and len(counts[0]) < 8
    assert not [name for name in counts[0] if "_local_scalar_dense" in name or "_to_copy" in name]


def test_a_gradient_that_is_not_finite_is_seen(one_process: None) -> None:
    parameters = _parameters()
    assert parameters[1].grad is not None
    parameters[1].grad.fill_(float("nan"))
    assert _norm(parameters, torch.distributed.group.WORLD) != _norm(parameters, torch.distributed.group.WORLD)


def test_kernels_that_are_installed_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer import clip_grads

    from megatron_vlm.runtime.gradient_clipping import install_gradient_clipping

    theirs = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    install_gradient_clipping()
    assert clip_grads.l2_norm_impl is theirs
