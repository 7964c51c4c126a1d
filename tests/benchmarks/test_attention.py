"""The benchmark of attention backends runs with a small model; on a CPU there is one backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks import attention
from benchmarks.attention import Shape
from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


def test_the_benchmark_runs(tmp_path: Path) -> None:
    grids = [[28, 56], [56, 28], [56, 56]]
    recipe = write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids)
    small = ["--config", str(recipe), "--repeats", "1", "--output", str(tmp_path)]
    done = launch_forked("-m", "benchmarks.attention", *small, ranks=1, timeout=120)
    backends = json.loads((tmp_path / "attention-cpu.json").read_text())["backends"]
    assert [measured["backend"] for measured in backends] == ["sdpa"] * 3
    assert all(measured["difference"] == 0 and measured["flops_per_second"] > 0 for measured in backends)
    assert "| language, one document" in done.stdout


def test_flops_of_a_long_document() -> None:
    """The convention of the FlashAttention papers, but for the diagonal."""
    shape = Shape("", [0, 32768], 16, 16, 128, causal=True)
    assert shape.flops == pytest.approx(3.5 * 4 * 32768**2 * 16 * 128 / 2, rel=1e-4)


def test_a_backend_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(attention.Attention):
        @property
        def kernel(self) -> Any:
            def kernel(*arguments: Any) -> Any:
                raise RuntimeError("no such kernel")

            return super().kernel if self.backend == "sdpa" else kernel

    monkeypatch.setattr(attention, "Attention", Failing)
    monkeypatch.setattr(attention, "PREFERRED", {"cpu": ("torch_varlen", "sdpa")})
    monkeypatch.setattr(attention, "why_not", lambda *arguments: None)
    failed: list[str] = []
    shape = Shape("two documents", [0, 5, 9], 2, 2, 8, causal=True)
    assert [result.backend for result in attention.measure(shape, torch.float32, 1, failed)] == ["sdpa"]
    assert failed == ["two documents: torch_varlen failed: no such kernel"]
