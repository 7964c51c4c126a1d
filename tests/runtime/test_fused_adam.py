"""FusedAdam computes what torch's AdamW computes, and keeps `step` in the param group."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.runtime.fused_adam import FusedAdam
from tests.support.operations import Operations


def test_updates_are_those_of_torch_adamw() -> None:
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    fused, reference = FusedAdam(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(1, 4):
        x = torch.randn(7, 5)
        for model, optimizer in ((ours, fused), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert fused.param_groups[0]["step"] == step
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_step_is_counted_without_gradients() -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))])
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_a_step_is_the_same_few_operations_for_any_number_of_parameters() -> None:
    """On a GPU each would be a launch, and a copy from the host would wait for the device."""
    counts = []
    for number in (3, 30):
        parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(number)]
        optimizer = FusedAdam(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones(4)
        optimizer.step()  # allocates the moments
        with Operations() as mode:
            optimizer.step()
        counts.append(mode.names)
    assert counts[0] == counts[1]
    assert [name for name in counts[0] if name.startswith("aten")] == [
        "aten.full.default",
        "aten._fused_adamw_.default",
    ]


def test_other_modes_are_rejected() -> None:
    with pytest.raises(ValueError, match="bias_correction and adam_w_mode must be True"):
        FusedAdam([torch.nn.Parameter(torch.ones(2))], adam_w_mode=False)
