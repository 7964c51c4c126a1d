"""Loss spikes are reported with the samples of the iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import Recipe


@pytest.fixture
def spikes(one_process: None, tmp_path: Path) -> Any:
    from megatron_vlm.training.loss_spikes import LossSpikes

    recipe = Recipe()
    recipe.training.save, recipe.training.loss_spike_factor = str(tmp_path), 2.0
    return LossSpikes(recipe)


def test_a_spike_is_listed_with_its_samples(spikes: Any, tmp_path: Path) -> None:
    losses = [3.0 - 0.1 * step for step in range(20)] + [2.9, 9.0, 1.0, float("nan"), 7.0]
    found = [spikes.check(step, loss, [f"s{step}"]) for step, loss in enumerate(losses, 1)]
    assert [step for step, spike in enumerate(found, 1) if spike] == [22, 25]
    records = [json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines()]
    assert [(record["iteration"], record["samples"]) for record in records] == [(22, ["s22"]), (25, ["s25"])]
    assert records[0]["loss"] == 9.0 and 1.9 < records[0]["median"] < 2.2


def test_the_first_losses_are_no_spikes(spikes: Any) -> None:
    assert not any(spikes.check(step, loss, []) for step, loss in enumerate([1.0, 100.0, 1.0, 50.0], 1))


def test_it_can_be_turned_off(spikes: Any) -> None:
    spikes._factor = 0.0
    assert not any(spikes.check(step, 1.0 if step < 20 else 50.0, []) for step in range(30))
