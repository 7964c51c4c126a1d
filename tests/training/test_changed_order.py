"""A resumed run checks that the order of its rows is that of its checkpoint, and reports what changed if it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_recipe
from megatron_vlm.data.errors import ChangedOrderError
from megatron_vlm.training.checkpoint import CheckpointError
from megatron_vlm.training.trainer import Trainer
from tests.training.tiny_run import write_recipe

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """A folder with a recipe, its data, and a run that was saved after 2 iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder)
    settings = {"save": str(folder / "run"), "train_iters": 2}
    Trainer(load_recipe(recipe, {"training": settings, "data": {"num_workers": 0}})).train()
    return folder


@pytest.fixture
def resume(stopped: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Resume a copy of that run, with changed settings by section."""
    shutil.copytree(stopped / "run", tmp_path / "run")

    def start(**changes: dict[str, Any]) -> Trainer:
        training = {"save": str(tmp_path / "run"), "train_iters": 3, **changes.get("training", {})}
        data = {"num_workers": 0, **changes.get("data", {})}
        return Trainer(load_recipe(stopped / "recipe.yaml", {"training": training, "data": data}))

    return start


def test_settings_that_keep_the_order_may_change(stopped: Path, tmp_path: Path, resume: Callable[..., Trainer]) -> None:
    """Rows per step, workers, learning rate, and the folder of the data."""
    moved = shutil.copytree(stopped / "data", tmp_path / "moved")
    data = {"data_path": [str(moved / "train.json")], "image_folder": str(moved / "images"), "num_workers": 1}
    trainer = resume(training={"global_batch_size": 2, "lr": 5e-4}, data=data)
    assert trainer.progress.consumed_rows == 8
    trainer.train()
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (3, 10)
    assert {group["max_lr"] for group in trainer.optimizer.param_groups} == {5e-4}


def test_rates_and_weight_decay_are_those_of_the_recipe(tmp_path: Path, resume: Callable[..., Trainer]) -> None:
    """Also if model parts get or keep their own, where megatron-core 0.16 gives all of them the same."""

    def settings(trainer: Trainer) -> set[tuple[float, float]]:
        """(peak rate, weight decay) of the groups that decay."""
        groups = [group for group in trainer.optimizer.param_groups if group["wd_mult"]]
        return {(group["max_lr"], group["weight_decay"]) for group in groups}

    own = {"lr": 5e-4, "vision_lr": 1e-4, "projector_lr": 2e-4}
    own |= {"vision_weight_decay": 0.3, "language_weight_decay": 0.0}
    expected = {(1e-4, 0.3), (2e-4, 0.01), (5e-4, 0.0)}
    trainer = resume(training=own)
    assert settings(trainer) == expected
    trainer.train()
    trainer = resume(training={**own, "train_iters": 4})
    assert trainer.progress.iteration == 3 and settings(trainer) == expected
    trainer.train()
    assert settings(resume(training={"lr": 5e-4, "train_iters": 4})) == {(5e-4, 0.01)}


def test_another_order_is_rejected_or_accepted(resume: Callable[..., Trainer]) -> None:
    with pytest.raises(ChangedOrderError, match=r"\(iteration 2\): .*seed is 43 .was 42.*--allow-changed"):
        resume(training={"seed": 43})
    trainer = resume(training={"seed": 43}, data={"allow_changed_order": True})
    trainer.train()
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (3, 12)
    with pytest.raises(ChangedOrderError, match="seed is 42 .was 43"):  # now saved
        resume()


def test_a_new_stage_has_its_own_order(tmp_path: Path, resume: Callable[..., Trainer]) -> None:
    stage = {"save": str(tmp_path / "next"), "pretrained_checkpoint": str(tmp_path / "run"), "seed": 43}
    trainer = resume(training={**stage, "trainable": ["projector"]})
    assert (trainer.progress.iteration, trainer.progress.consumed_rows) == (0, 0)


def test_other_trainable_parts_are_another_stage(resume: Callable[..., Trainer]) -> None:
    with pytest.raises(CheckpointError, match="trainable is projector here and language, projector, vision there"):
        resume(training={"trainable": ["projector"]})
