"""The training process computes nothing on the host with tensors as long as a row, and waits for no device.

Layouts, slices and indices are made in the loader's workers. On a GPU such work kept the device idle for a quarter of
the time, because it competed with the workers for the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_vlm.config import ParallelConfig, check_recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.rows.rank_batch import RankBatch, rank_batch
from tests.parallel.rows import SEQ_LENGTH, make_row, tiny_recipe
from tests.support.host_work import RowLongHostWork
from tests.training.tiny_run import write_recipe

META = torch.device("meta")


def _row_lengths(row: RankBatch) -> set[int]:
    """Lengths of everything that grows with the row."""
    assert row.feature_positions is not None and row.supervised is not None
    return {SEQ_LENGTH, len(row.feature_positions), len(row.supervised)}


@pytest.fixture(scope="module")
def model(one_process: None) -> Any:
    """The tiny model on torch's meta device: it has shapes, and no operation can wait for a value."""
    from megatron_vlm.model.build import build_model

    (model,) = build_model(tiny_recipe(ParallelConfig()), META)
    return model


@pytest.mark.parametrize("index", [0, 1, 2])
def test_forward_and_backward_read_nothing_from_the_host(model: Any, index: int) -> None:
    """On the meta device an operation whose shape depends on values, or which copies a value back, raises."""
    row = rank_batch(make_row(index), model.view)
    with RowLongHostWork(_row_lengths(row)) as mode:
        model(row).backward()
    assert mode.found == []


def test_host_work_in_the_forward_pass_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model did before: documents grouped, and labels searched, when it needed them."""
    row = rank_batch(make_row(0), model.view)
    on_device = model.on_device

    def sorts_first(batch: Any) -> Any:
        torch.argsort(row.positions)
        return on_device(batch)

    monkeypatch.setattr(model, "on_device", sorts_first)
    with RowLongHostWork(_row_lengths(row)) as mode:
        model(row)
    assert len(mode.found) >= 3 and all("sort" in name for name in mode.found)  # once for each call of on_device


def test_waiting_for_the_device_in_the_forward_pass_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.model.loss import LossHead

    forward = LossHead.forward
    monkeypatch.setattr(
        LossHead, "forward", lambda head, hidden, at, *rest: forward(head, hidden, (at >= 0).nonzero()[:, 0], *rest)
    )
    with pytest.raises(NotImplementedError, match="meta"):
        model(rank_batch(make_row(0), model.view))


@pytest.fixture
def trainer(one_process: None, tmp_path: Path) -> Iterator[Any]:
    """A trainer of the command line's tiny run, with a worker process."""
    from megatron_vlm.training.trainer import Trainer

    recipe = load_recipe(write_recipe(tmp_path))
    check_recipe(recipe, 1)
    trainer = Trainer(recipe)
    yield trainer
    trainer.loader.close()
    trainer.checkpointer.close()


def test_a_training_step_computes_nothing_row_long_outside_the_model(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, backward and update, which a GPU would do, are not counted; a planted operation is."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_vlm.model.vlm import VisionLanguageModel
    from megatron_vlm.training import trainer as trainer_module

    def uncounted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(VisionLanguageModel, "forward", uncounted(VisionLanguageModel.forward))
    monkeypatch.setattr(schedules, "backward_step", uncounted(schedules.backward_step))
    monkeypatch.setattr(trainer_module, "update_and_loss", uncounted(trainer_module.update_and_loss))
    with RowLongHostWork({trainer.recipe.data.seq_length}) as mode:
        trainer.train_step()
    assert mode.found == []

    next_row = trainer.loader.__class__.__next__
    monkeypatch.setattr(trainer.loader.__class__, "__next__", lambda loader: _planted(next_row(loader)))
    with RowLongHostWork({trainer.recipe.data.seq_length}) as mode:
        trainer.train_step()
    assert mode.found.count("aten.add.Tensor") == trainer.recipe.training.global_batch_size


def _planted(row: RankBatch) -> RankBatch:
    row.positions = row.positions + 0
    return row
