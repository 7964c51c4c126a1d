"""Settings of the run's length, loss and metrics through the command line, in one run on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import metrics, run, write_recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings")
    settings = {
        "epochs": 1.5, "rampup_batch_size": [2, 2, 5], "lr_decay_style": "WSD", "lr_warmup_iters": 1,
        "lr_wsd_decay_iters": 1,
    }  # fmt: skip
    recipe = write_recipe(folder, **settings)
    folder.joinpath("out").write_text(run(recipe, folder / "save", ranks=2).stdout)
    return folder


def test_rows_per_step_grow_and_the_run_ends_after_the_epochs(work: Path) -> None:
    lines = metrics(work / "save")
    rows = [line["rows"] for line in lines]
    assert rows[:3] == [2, 2, 2] and set(rows[3:]) == {4}, "2 for rows 0 to 4, then 4"
    (summary,) = [line for line in (work / "out").read_text().splitlines() if "rows per epoch" in line]
    wanted = 1.5 * int(summary.split("rows per epoch ")[1].split(",")[0])
    assert wanted <= sum(rows) < wanted + 4
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and set(rates[1:]) == {1e-3}
