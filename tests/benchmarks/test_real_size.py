"""The full-size benchmark runs with a small model, and all loops have the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_size import Measured, check_none_failed, measure, step_flops
from benchmarks.support.instruct_samples import InstructRows
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.rows.batch import IGNORE_INDEX
from tests.benchmarks.small_recipe import write_small_recipe
from tests.support.forked_ranks import launch_forked


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    grids = [[28 * w, 28 * h] for w, h in [(1, 1), (2, 2), *[(n, 1) for n in range(2, 6)]]]
    return write_small_recipe(tmp_path / "recipe.yaml", seq_length=16384, max_tiles=80, grids=grids)


@pytest.mark.timeout(600)
def test_the_benchmark_runs(recipe: Path, tmp_path: Path) -> None:
    """The benchmark stops unless all loops have the same loss before training."""
    small = ["--config", str(recipe), "--rows", "1", "--rounds", "1", "--micro-batches", "4"]
    done = launch_forked("-m", "benchmarks.real_size", *small, "--output", str(tmp_path), ranks=1, timeout=580)
    result = json.loads((tmp_path / "real_size-cpu.json").read_text())
    loops = {loop["name"]: loop for loop in result["loops"]}
    assert list(loops) == [
        "megatron-vlm, packed", "megatron-vlm, packed, full recompute", "megatron-vlm, packed, Transformer Engine",
        "megatron-vlm, packed, FP8 delayed", "megatron-vlm, packed, FP8 tensorwise",
        "transformers, micro-batch 4", "transformers, micro-batch 4, full recompute",
    ]  # fmt: skip
    assert [loop["failed"] for loop in loops.values()] == ["", "", *["cannot run here"] * 3, "", ""]
    losses = [loop["loss"] for loop in loops.values() if not loop["failed"]]
    kinds = result["seconds_by_kind"]["megatron-vlm, packed"]
    assert {"matrix products", "attention", "optimizer"} <= kinds.keys() and min(kinds.values()) >= 0
    assert (
        done.stdout.count("transformers, flash-attn and Liger: cannot run here: flash-attn and liger-kernel not") == 1
    )
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_rows_contain_their_samples(recipe: Path) -> None:
    settings = load_recipe(recipe)
    source = InstructRows(settings.model, settings.data.seq_length, settings.data.max_tiles_per_row)
    samples = source.samples(0)
    row = source.pack(samples)
    assert row.num_tokens == sum(map(len, samples)) > 0.99 * settings.data.seq_length
    assert row.tiles is not None and len(row.tiles) == row.num_tiles == sum(sum(s.tile_counts) for s in samples)
    assert 0.2 < float((row.labels != IGNORE_INDEX).float().mean()) < 0.5
    assert step_flops(settings, samples) > step_flops(settings, samples[1:]) > 0


def test_a_loop_that_fails_is_reported_after_the_others() -> None:
    def build() -> Any:
        raise ValueError("no such layer")

    failed = measure("ours", build, rounds=1)
    assert failed.failed == "failed with ValueError"
    check_none_failed([Measured("theirs", [1.0], 0, 0.0), Measured("absent", [], 0, 0.0, "cannot run here")])
    with pytest.raises(SystemExit, match="ours failed with ValueError"):
        check_none_failed([failed])
