"""The training-step benchmark runs, and all loops train on the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.samples import SampleGenerator, build_workload
from benchmarks.train_step import recipe_of
from megatron_vlm.data.rows.batch import IGNORE_INDEX
from tests.support.forked_ranks import launch_forked


def test_all_loops_get_the_same_samples() -> None:
    generator = SampleGenerator(recipe_of(2, 1024).model, seed=1)
    work = build_workload(generator, steps=3, rows_per_step=2, seq_length=1024)
    packed = sorted(id(sample) for step in work.packed for sample in step)
    assert packed == sorted(id(sample) for step in work.padded for sample in step)
    assert packed == sorted(id(sample) for step in work.grouped for sample in step)
    assert len(work.rows) == len(work.padded) == len(work.grouped) == 3
    assert max(map(len, work.padded)) - min(map(len, work.padded)) <= 1
    lengths = [len(sample) for step in work.grouped for sample in step]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(row.num_tokens for step in work.rows for row in step) == work.tokens
    labels = sum(int((row.labels != IGNORE_INDEX).sum()) for step in work.rows for row in step)
    answers = (sample.document.encoded.labels[1:] for step in work.padded for sample in step)
    assert labels == sum(int(np.count_nonzero(answer != IGNORE_INDEX)) for answer in answers)


def test_the_long_sample_fills_a_row() -> None:
    generator = SampleGenerator(recipe_of(1, 2048).model, seed=1)
    sample = generator.row_long_sample(2048)
    assert len(sample) == generator.row([sample], 2048).num_tokens == 2048
    assert len(sample.document.image_sizes) > 1


@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Before timing, the benchmark compares both losses on the same samples."""
    small = ["--rounds", "1", "--steps", "1", "--rows", "1", "--seq-length", "1024", "--output", str(tmp_path)]
    done = launch_forked("-m", "benchmarks.train_step", *small, ranks=1, timeout=170)
    result = json.loads((tmp_path / "train_step.json").read_text())
    assert result["loss_difference"] < 1e-5
    assert set(result["speedup_of_packing"]) == set(result["seconds"])
    assert "| megatron-vlm, packed" in done.stdout
