"""Every compared algorithm packs each sample once within both budgets; the sampled mix has the stated percentiles."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing
from benchmarks.packing import PACKINGS, describe, imbalance
from benchmarks.support.packing_lengths import MIX_PERCENTILES, Samples, hard_to_pack, read_lengths, sample_mix
from megatron_vlm.data.packing.epoch_plan import Budget

BUDGET = Budget(32768, 80, 1000)


@pytest.mark.parametrize("name", PACKINGS)
def test_every_sample_once_within_budgets(name: str) -> None:
    rng = np.random.default_rng(0)
    mix = sample_mix(1500, rng)
    for samples in (mix, *hard_to_pack(mix, rng)):
        packed = PACKINGS[name](samples, BUDGET, 1)
        found = describe(samples, packed, BUDGET)  # raises if a sample is missing or a budget exceeded
        assert 0.9 < found["min_rows_over_rows"] <= 1, samples.name


def test_an_invalid_packing_is_rejected() -> None:
    samples = Samples("two", np.array([20_000, 20_000]), np.array([1, 1]))
    for packed in [
        (np.array([0, 2]), np.array([0, 1])),
        (np.array([0, 1, 2]), np.array([0, 0])),
        (np.array([0, 1]), np.array([0])),
    ]:
        with pytest.raises(SystemExit, match="loses a sample or exceeds a budget"):
            describe(samples, packed, BUDGET)


def test_each_algorithm_on_six_samples() -> None:
    """Rows of ten tokens: algorithms that sort find the three full rows, the streaming one does not."""
    samples = Samples("few", np.array([4, 8, 5, 2, 6, 5]), np.zeros(6, np.int64))
    rows = {}
    for name, pack in PACKINGS.items():
        starts, members = pack(samples, Budget(10, 1, 6), 1)
        rows[name] = sorted(sorted(samples.tokens[row].tolist()) for row in np.split(members, starts[1:-1]))
    full = [[2, 8], [4, 6], [5, 5]]
    *peers, stream = list(PACKINGS)
    assert all(rows[name] == full for name in peers)
    assert rows[stream] == [[2, 8], [4, 5], [5], [6]]


def test_imbalance_over_ranks() -> None:
    costs = np.array([1.0, 3.0, 2.0, 2.0, 9.0])
    np.testing.assert_allclose(imbalance(costs, 2, 1), [1.5, 1.0])
    np.testing.assert_allclose(imbalance(costs, 2, 2), [1.25])


def test_the_sampled_mix() -> None:
    with MIX_PERCENTILES.open() as file:
        table = [row for row in csv.DictReader(file) if row["quantity"] == "text_tokens"]
    mix = sample_mix(50_000, np.random.default_rng(0))
    assert 14.2 < 32768 / mix.tokens.mean() < 14.7
    for row in table:
        share = int(row["samples"]) / sum(int(other["samples"]) for other in table)
        assert (mix.tiles == int(row["tiles"])).mean() == pytest.approx(share, abs=0.01)
    text = mix.tokens[mix.tiles == 0]
    assert np.percentile(text, [10, 50, 90]) == pytest.approx([368, 896, 2169], rel=0.08)


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = tmp_path / "mine.csv"
    mix = sample_mix(600, np.random.default_rng(0))
    lines = [f"{tokens},{tiles},0" for tokens, tiles in zip(mix.tokens, mix.tiles, strict=True)]
    lengths.write_text("\n".join(["image_tokens,tiles,text_tokens", *lines]) + "\n")
    assert sorted(read_lengths(lengths, np.random.default_rng(1)).tokens) == sorted(mix.tokens)
    monkeypatch.setattr(packing, "RANKS", 8)
    arguments = ["--lengths", str(lengths), "--window", "300", "--plan", "2000", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["packing", *arguments])
    packing.main()
    result = json.loads((tmp_path / "packing.json").read_text())
    assert set(result["sets"]["mine"]["packings"]) == set(PACKINGS)
    assert result["plan"]["first"]["rows"] > 100 and result["plan"]["opened"]["samples"] > 0
    assert "reopened in mid-epoch" in capsys.readouterr().out
