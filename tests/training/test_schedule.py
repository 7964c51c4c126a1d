"""Learning rates of each schedule against torch's schedulers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from megatron_vlm.config import Recipe, TrainingConfig
from megatron_vlm.training.optimizer import build_schedule

TOTAL, LR = 40, 0.5


def _ours(training: TrainingConfig) -> list[float]:
    """The rate that each iteration uses; Megatron-LM counts the warmup from 0, as torch's LinearLR does from there."""
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(optimizer, Recipe(training=training))
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return rates


def _torch(stages: list[tuple[int, Any]]) -> list[float]:
    """Rates of schedulers one after the other, each given as (iterations, function of an optimizer)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    milestones = [sum(length for length, _ in stages[: i + 1]) for i in range(len(stages) - 1)]
    scheduler = SequentialLR(optimizer, [make(optimizer) for _, make in stages], milestones)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _warmup(iterations: int) -> tuple[int, Any]:
    # torch forbids a factor of 0
    return iterations, lambda optimizer: LinearLR(optimizer, 1e-12, 1.0, iterations)


def _constant(iterations: int) -> tuple[int, Any]:
    return iterations, lambda optimizer: ConstantLR(optimizer, 1.0, 1)


def _cosine(iterations: int, end: float = 0.0) -> tuple[int, Any]:
    return iterations, lambda optimizer: CosineAnnealingLR(optimizer, iterations, end)


def _linear(iterations: int) -> tuple[int, Any]:
    return iterations, lambda optimizer: LinearLR(optimizer, 1.0, 1e-12, iterations)


CASES = {
    "cosine, warmup in iterations": (
        {"lr_decay_style": "cosine", "lr_warmup_iters": 6, "min_lr": 0.1}, [_warmup(6), _cosine(34, 0.1)],
    ),
    "linear, warmup as a fraction": (
        {"lr_decay_style": "linear", "lr_warmup_fraction": 0.1}, [_warmup(4), _linear(36)],
    ),
    "constant": ({"lr_decay_style": "constant", "lr_warmup_iters": 5}, [_warmup(5), _constant(35)]),
    "WSD, a tenth": ({"lr_decay_style": "WSD", "lr_warmup_iters": 4}, [_warmup(4), _constant(32), _linear(4)]),
    "WSD, cosine": (
        {"lr_decay_style": "WSD", "lr_warmup_iters": 4, "lr_wsd_decay_iters": 16, "lr_wsd_decay_style": "cosine"},
        [_warmup(4), _constant(20), _cosine(16)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rates_are_torchs(name: str) -> None:
    settings, stages = CASES[name]
    ours = _ours(TrainingConfig(train_iters=TOTAL, lr=LR, **settings))
    assert ours == pytest.approx(_torch(stages), abs=1e-9)
