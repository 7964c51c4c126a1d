"""Ranges and choices, setting by setting."""

from __future__ import annotations

import pytest

from megatron_vlm.config import Recipe
from megatron_vlm.config.checks.values import AT_LEAST_ONE, FRACTIONS, NOT_NEGATIVE, POSITIVE, check_values
from megatron_vlm.config.recipe import iter_settings

# Written out again, so that the tests fail if a setting is missing from the lists of checks/values.py.
WITHOUT_RANGE = {"model.vision.vision_feature_layer", "model.image_token_index"}
OUT_OF_RANGE = [
    ("training.train_iters", 0),
    ("training.epochs", 0.0),
    ("training.lr_warmup_iters", -1),
    ("training.lr_wsd_decay_iters", 0),
    ("training.global_batch_size", 0),
    ("training.save_interval", 0),
    ("training.save_total_limit", 0),
    ("training.save_retain_interval", 0),
    ("training.log_interval", -1),
    ("training.loss_spike_factor", -1.0),
    ("training.profile_step_start", 0),
    ("training.eval_interval", 0),
    ("training.eval_iters", 0),
    ("data.valid_share", 1.0),
    ("training.distributed_timeout_minutes", 0),
    ("training.max_skipped_updates", 0),
    ("training.exit_interval", 0),
    ("training.exit_duration_in_mins", 0.0),
    ("training.seed", -1),
    ("training.lr", 0.0),
    ("training.vision_lr", -1e-5),
    ("training.projector_lr", 0.0),
    ("training.language_lr", -1.0),
    ("training.vision_weight_decay", -0.1),
    ("training.min_lr", -1e-5),
    ("training.weight_decay", -0.1),
    ("training.clip_grad", -1.0),
    ("training.adam_eps", 0.0),
    ("training.adam_beta1", 1.0),
    ("training.adam_beta2", -0.1),
    ("training.sgd_momentum", 1.0),
    ("training.lr_warmup_fraction", 1.0),
    ("parallel.ddp_bucket_size", 0),
    ("data.seq_length", 0),
    ("data.max_tiles_per_row", 0),
    ("data.packing_window", 0),
    ("data.num_workers", -1),
    ("model.vision.layer_norm_eps", 0.0),
    ("model.language.layer_norm_eps", 0.0),
    ("model.language.rope_theta", 0.0),
]


UNKNOWN_CHOICES = [
    ("training.optimizer", "adamw"),
    ("training.lr_decay_style", "exponential"),
    ("training.lr_wsd_decay_style", "wsd"),
    ("training.recompute_granularity", "some"),
    ("data.image_aspect_ratio", "any"),
    ("data.image_aspect_ratio", "anyres_max_N"),
    ("data.image_aspect_ratio", "anyres_max_0"),
    ("data.oversized_samples", "clip"),
    ("parallel.vision_parallel", "pipeline"),
    ("model.vision.hidden_act", "relu"),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_the_only_problem(problems_of, key, value):
    (problem,) = problems_of({key: value})
    assert problem.startswith(f"{key} = {value}:")


@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_a_size_of_zero_is_a_problem(problems_of, key):
    assert any(problem.startswith(f"{key} = 0: too small") for problem in problems_of({key: 0}))


def test_every_number_has_a_range():
    numbers = {
        setting.key for setting in iter_settings(Recipe()) if setting.hint in (int, int | None, float, float | None)
    }
    assert numbers == WITHOUT_RANGE.union(AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, FRACTIONS)


@pytest.mark.parametrize(("key", "value"), UNKNOWN_CHOICES)
def test_unknown_choice_is_the_only_problem(problems_of, key, value):
    (problem,) = problems_of({key: value})
    assert problem.startswith(f"{key}: expected one of ") and f"got {value!r}" in problem


@pytest.mark.parametrize(("key", "value"), UNKNOWN_CHOICES)
def test_unknown_choice_in_a_recipe_made_in_python(small_recipe, key, value):
    recipe = small_recipe({})
    section, name = recipe, key
    while "." in name:
        parent, _, name = name.partition(".")
        section = getattr(section, parent)
    setattr(section, name, value)
    (problem,) = check_values(recipe)
    assert str(problem).startswith(f"{key} = {value}: not a valid choice. Choose from ")


def test_unknown_choice_names_the_nearest(problems_of):
    (problem,) = problems_of({"training.lr_decay_style": "cosin"})
    assert "cosine, linear, constant" in problem
    assert "the nearest is cosine" in problem


@pytest.mark.parametrize("value", ["anyres", "anyres_max_9", "anyres_max_16", "square", "pad"])
def test_choices_with_a_number(problems_of, value):
    assert problems_of({"data.image_aspect_ratio": value}) == []


def test_an_unknown_part_and_no_part_at_all_are_problems(problems_of):
    (unknown,) = problems_of({"training.trainable": ["projector", "visoin"]})
    assert unknown.startswith("training.trainable: expected a list") and "'visoin'" in unknown
    assert "the nearest is vision" in unknown
    (empty,) = problems_of({"training.trainable": []})
    assert empty.startswith("training.trainable = nothing: empty")
    assert problems_of({"training.trainable": ["projector"]}) == []


@pytest.mark.parametrize("key", NOT_NEGATIVE + FRACTIONS)
def test_zero_is_allowed(problems_of, key):
    assert problems_of({key: 0}) == []
