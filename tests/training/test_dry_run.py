"""`--dry-run` reports what a run would do: its data with the table of the mixture, rows, steps."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from megatron_vlm.config import Recipe
from megatron_vlm.training.dry_run import describe_run
from tests.data.helpers import make_recipe, mixed_folder, tiny_tokenizer_folder


def test_a_mixture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = mixed_folder(tmp_path, 20)
    folder.write("a.json")
    folder.add("gone", "<image>", "yes", image="gone.png")
    folder.write("b.jsonl")
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.json, repeat: 2}, {json_path: b.jsonl, choose: 5}]")
    recipe = make_recipe(
        [str(tmp_path / "mix.yaml")], folder.images, tiny_tokenizer_folder(tmp_path / "t"), data_root=str(tmp_path)
    )
    recipe.data.valid_data_path = [str(tmp_path / "a.json")]
    recipe = Recipe(recipe.model, recipe.data, recipe.training)
    recipe.training.epochs, recipe.training.rampup_batch_size = 2, [2, 2, 8]
    with caplog.at_level(logging.INFO):
        report = describe_run(recipe, world_size=2)
    steps, epochs = re.search(r"run +(\d+) steps = ([\d.]+) epochs", report).groups()  # type: ignore[union-attr]
    assert int(steps) == recipe.training.train_iters < 1000 and 2 <= float(epochs) < 2.3
    assert f"tokens     {steps} steps x" in report and "for the planned rows" in report
    assert "validation 20 samples" in report and "rows every 1000 steps" in report
    assert "growing from 2 by 2 over the first 8 rows" in report
    assert "41 samples, 40 usable, rejected {'missing image': 1}, too long 0" in report and "2 ranks = data 2" in report
    (table,) = [message for message in caplog.messages if message.startswith("samples of the first epoch:")]
    assert [line.split()[1:4] for line in table.splitlines()[2:4]] == [
        ["repeat:2", "20", "40"],
        ["choose:5", "21", "5"],
    ]
    assert table.splitlines()[-1].split()[:3] == ["all", "41", "45"]
    assert any("gone.png" in message for message in caplog.messages)
