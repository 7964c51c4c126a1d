"""A run that goes on sees that its rows are still those that were to come, and says what changed if they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_recipe
from megatron_vlm.training.checkpoint import CheckpointError
from megatron_vlm.training.trainer import Trainer
from tests.training.tiny_run import write_recipe

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """A recipe, its data, and a run of it that was saved after 2 iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder)
    settings = {"save": str(folder / "run"), "train_iters": 2}
    Trainer(load_recipe(recipe, {"training": settings, "data": {"num_workers": 0}})).run()
    return folder


@pytest.fixture
def go_on(stopped: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Go on from a copy of that run, with other settings by section."""
    shutil.copytree(stopped / "run", tmp_path / "run")

    def start(**changes: dict[str, Any]) -> Trainer:
        training = {"save": str(tmp_path / "run"), "train_iters": 3, **changes.get("training", {})}
        data = {"num_workers": 0, **changes.get("data", {})}
        return Trainer(load_recipe(stopped / "recipe.yaml", {"training": training, "data": data}))

    return start


def test_what_does_not_matter_may_change(stopped: Path, tmp_path: Path, go_on: Callable[..., Trainer]) -> None:
    """Rows per step, workers, learning rate, and where the data lies."""
    moved = shutil.copytree(stopped / "data", tmp_path / "moved")
    data = {"data_path": [str(moved / "train.json")], "image_folder": str(moved / "images"), "num_workers": 1}
    trainer = go_on(training={"global_batch_size": 2, "lr": 5e-4}, data=data)
    assert trainer.progress.consumed_rows == 8
    trainer.run()
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (3, 10)
    assert {group["max_lr"] for group in trainer.optimizer.param_groups} == {5e-4}


def test_rates_are_those_of_the_recipe(tmp_path: Path, go_on: Callable[..., Trainer]) -> None:
    """Also where parts get rates of their own, or keep them: megatron-core 0.16 gives all the rate of one."""

    def rates(trainer: Trainer) -> list[float]:
        return sorted({group["max_lr"] for group in trainer.optimizer.param_groups})

    own = {"lr": 5e-4, "vision_lr": 1e-4, "projector_lr": 2e-4}
    trainer = go_on(training=own)
    assert rates(trainer) == [1e-4, 2e-4, 5e-4]
    trainer.run()
    trainer = go_on(training={**own, "train_iters": 4})
    assert trainer.progress.iteration == 3 and rates(trainer) == [1e-4, 2e-4, 5e-4]
    trainer.run()
    assert rates(go_on(training={"lr": 5e-4, "train_iters": 4})) == [5e-4]


def test_another_order_is_refused_or_accepted(go_on: Callable[..., Trainer]) -> None:
    with pytest.raises(CheckpointError, match="not as it was at iteration 2: .*seed is 43 .was 42.*--allow-ch"):
        go_on(training={"seed": 43})
    trainer = go_on(training={"seed": 43}, data={"allow_changed_order": True})
    trainer.run()
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (3, 12)
    with pytest.raises(CheckpointError, match="seed is 42 .was 43"):  # from then on that order is kept
        go_on()


def test_a_new_stage_has_an_order_of_its_own(tmp_path: Path, go_on: Callable[..., Trainer]) -> None:
    stage = {"save": str(tmp_path / "next"), "pretrained_checkpoint": str(tmp_path / "run"), "seed": 43}
    trainer = go_on(training={**stage, "trainable": ["projector"]})
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (0, 0)


def test_other_parts_are_another_stage(go_on: Callable[..., Trainer]) -> None:
    with pytest.raises(CheckpointError, match="trainable is projector here and language, projector, vision there"):
        go_on(training={"trainable": ["projector"]})
