"""Rows per iteration against Megatron-LM's ramp-up, and iterations of a number of epochs."""

from __future__ import annotations

import pytest

from megatron_vlm.config import ConfigError, Recipe, TrainingConfig
from megatron_vlm.training.checkpoint import Progress
from megatron_vlm.training.run_length import batch_size, iterations_for_rows, resolve_epochs, rows_of_iterations

RAMPS = [(16, [4, 4, 48]), (32, [8, 2, 1000]), (24, [8, 16, 7]), (1536, [32, 32, 5_859_375])]


@pytest.mark.parametrize(("rows", "ramp"), RAMPS)
def test_ramp_is_megatrons(rows: int, ramp: list[int]) -> None:
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    if not hasattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this version of megatron-core has no ramp-up any more")
    megatron = calculators.RampupBatchsizeNumMicroBatchesCalculator(rows, 1, 1, False, 1, *ramp)
    training = TrainingConfig(global_batch_size=rows, rampup_batch_size=ramp)
    consumed = 0
    for _ in range(500):
        megatron.update(consumed, consistency_check=False)
        assert batch_size(training, consumed) == megatron.get_current_global_batch_size()
        consumed += batch_size(training, consumed)


@pytest.mark.parametrize(("rows", "ramp"), [*RAMPS[:3], (16, None)])
def test_rows_and_iterations_are_inverse(rows: int, ramp: list[int] | None) -> None:
    training = TrainingConfig(global_batch_size=rows, rampup_batch_size=ramp)
    for iterations in (1, 2, 5, 90):
        consumed = rows_of_iterations(training, iterations)
        assert iterations_for_rows(training, consumed) == iterations
        assert iterations_for_rows(training, consumed + 1) == iterations + 1


def test_epochs_cover_all_their_rows() -> None:
    recipe = Recipe(training=TrainingConfig(global_batch_size=8, epochs=1.5))
    resolve_epochs(recipe, rows_per_epoch=50)
    assert recipe.training.train_iters == 10, "75 rows in iterations of 8"
    assert recipe.training.warmup_iters == 0


def test_epochs_count_the_rows_left_after_a_changed_batch_size() -> None:
    recipe = Recipe(training=TrainingConfig(global_batch_size=4, epochs=1))
    resolve_epochs(recipe, rows_per_epoch=50, progress=Progress(iteration=5, consumed_rows=40))
    assert recipe.training.train_iters == 5 + 3


def test_train_iters_stay_without_epochs() -> None:
    recipe = Recipe(training=TrainingConfig(train_iters=7))
    resolve_epochs(recipe, rows_per_epoch=50)
    assert recipe.training.train_iters == 7


def test_a_warmup_longer_than_the_epochs_is_an_error() -> None:
    recipe = Recipe(training=TrainingConfig(global_batch_size=8, epochs=1, lr_warmup_iters=7))
    with pytest.raises(ConfigError, match="which has 7 iterations. Use at most 6"):
        resolve_epochs(recipe, rows_per_epoch=50)
