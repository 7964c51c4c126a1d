"""The conversion benchmark runs with a small model, and its memory figure contains what a process allocates."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.convert import anonymous_bytes, compare, table_of
from checkpoint_convert.huggingface.safetensors import FolderTensors
from megatron_vlm.config import recipe_from_dict
from tests.training.tiny_run import MODEL


def test_the_benchmark_runs(tmp_path: Path) -> None:
    results = compare(tmp_path, recipe_from_dict({"model": MODEL}).model, "bfloat16")
    assert list(results["runs"]) == ["cp", "hf_to_megatron", "megatron_to_hf"]
    before, after = FolderTensors(tmp_path / "folder", "llava"), FolderTensors(tmp_path / "back", "llava")
    assert results["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    lines = table_of(results["runs"]).splitlines()
    assert len(lines) == 5 and "1.00 x" in lines[2]


def test_allocated_memory_is_counted() -> None:
    before = anonymous_bytes()
    allocated = b"x" * 200_000_000
    assert 190e6 < anonymous_bytes() - before < 250e6 and len(allocated)
