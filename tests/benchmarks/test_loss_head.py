"""The benchmark of the loss head runs at a small size, and calls Liger as its published source has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import loss_head
from tests.contracts import signatures
from tests.contracts.signatures import with_signature
from tests.support.forked_ranks import launch_forked


def test_the_benchmark_runs(tmp_path: Path) -> None:
    small = ["--tokens", "512", "--vocab-size", "3000", "--hidden-size", "16", "--rounds", "1"]
    done = launch_forked("-m", "benchmarks.loss_head", *small, "--output", tmp_path, ranks=1, timeout=120)
    (size,) = json.loads((tmp_path / "loss_head-cpu.json").read_text())["sizes"]
    plain, ours = size["ways"][loss_head.PLAIN], size["ways"][loss_head.OURS]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert 0 < ours["gradients_differ_by"] < 1e-5 and ours["extra_bytes"] < plain["extra_bytes"]
    assert "| 512 tokens, megatron-vlm" in done.stdout


def test_liger_is_called_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    init, forward = (with_signature(published, lambda arguments: arguments) for published in signatures.LIGER_LOSS)

    class Loss:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.arguments = init(self, *args, **kwargs)

        def __call__(self, *args: Any) -> torch.Tensor:
            a = forward(self, *args)
            return loss_head.plain(a["_input"], a["lin_weight"], a["target"])

    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    loss = loss_head._loss_of(loss_head.LIGER)(hidden, weight, targets)
    assert loss == loss_head.plain(hidden, weight, targets)
