"""Reading recipes from YAML, and the error messages for invalid ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from megatron_vlm.config import (
    ConfigError,
    ParallelConfig,
    Recipe,
    load_recipe,
    parse_command_line,
    recipe_from_dict,
    recipe_to_dict,
)


def write(folder, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def problems_in(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    return caught.value.problems


def test_without_a_file_all_settings_are_defaults():
    assert load_recipe(None) == Recipe()


def test_file_overrides_defaults_and_is_overridden(tmp_path):
    path = write(
        tmp_path, "training:\n  lr: 1e-3\n  train_iters: 5\nmodel:\n  vision: {hidden_size: 8}\ndata:\nparallel: {}\n"
    )
    recipe = load_recipe(path, {"training": {"train_iters": 7}})
    assert recipe.training.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert recipe.training.train_iters == 7
    assert recipe.model.vision.hidden_size == 8
    assert recipe.data == Recipe().data


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("training: {trian_iters: 3}", "training.train_iters"),
        ("training: {global-batch-size: 3}", "training.global_batch_size"),
        ("parallel: {tensor_parallel_size: 3}", "parallel.tensor_model_parallel_size"),
        ("training: {seq_length: 3}", "data.seq_length"),
        ("lr: 3", "training.lr"),
        ("trainning: {lr: 3}", "training"),
        ("model: {langauge: {}}", "model.language"),
        ("model: {hidden_size: 3}", "model.vision.hidden_size"),
        ("model: {language: {hiden_size: 3}}", "model.language.hidden_size"),
        ("model: {image_grid_pinpoint: []}", "model.image_grid_pinpoints"),
        ("lrr: 3", "training.lr"),
    ],
)
def test_unknown_key_is_reported_with_the_file_and_a_suggestion(tmp_path, text, guess):
    path = write(tmp_path, text)
    (problem,) = problems_in(path)
    assert problem.startswith(f"{path}: ")
    assert f"Did you mean {guess}?" in problem


def test_a_key_similar_to_no_setting_points_to_the_help(tmp_path):
    (problem,) = problems_in(write(tmp_path, "qqqqq: 1"))
    assert "--help" in problem


def test_settings_of_megatron_lm_that_do_not_exist_here_are_explained(tmp_path):
    (problem,) = problems_in(write(tmp_path, "parallel: {sequence_parallel: true}"))
    assert "always on when tensor_model_parallel_size > 1" in problem


def test_all_wrong_keys_and_types_are_reported_together(tmp_path):
    path = write(tmp_path, "training: {lr: fast, bf16: 1, trainable: projector}\ndata: {sequence: 1}\nparallel: 3\n")
    problems = problems_in(path)
    assert len(problems) == 5
    assert problems[0] == f"{path}: training.lr: expected a number, got 'fast'."
    assert problems[1].startswith(f"{path}: training.bf16: expected true or false")
    assert problems[2].startswith(f"{path}: training.trainable: expected a list")
    assert problems[3].startswith(f"{path}: data.sequence: there is no such setting")
    assert problems[4].startswith(f"{path}: parallel: expected settings")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: [", "not valid YAML"),
        ("training: {lr: 1.0, lr: 2.0}", "lr is given twice"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("- 1\n- 2\n", "the whole file: expected settings"),
    ],
)
def test_invalid_files(tmp_path, text, message):
    path = write(tmp_path, text)
    (problem,) = problems_in(path)
    assert path in problem
    assert message in problem


def test_anchors_and_merges_work(tmp_path):
    path = write(tmp_path, "training: &t {lr: 1.0e-3}\nparallel: {}\n")
    assert load_recipe(path).training.lr == 1e-3
    path = write(tmp_path, "model:\n  vision: &v {layer_norm_eps: 0.1}\n  language: {<<: *v, rope_theta: 5}\n")
    assert load_recipe(path).model.language.layer_norm_eps == 0.1


def test_missing_file_is_named(tmp_path):
    (problem,) = problems_in(str(tmp_path / "none.yaml"))
    assert "none.yaml" in problem
    assert "No such file" in problem


def test_round_trip_through_json_and_yaml():
    recipe = load_recipe(None, {"training": {"lr": 3e-7, "vision_lr": 1e-6, "trainable": ["projector"], "bf16": True}})
    recipe.model.image_grid_pinpoints = [[28, 56]]
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe_to_dict(recipe)))) == recipe


@pytest.mark.parametrize(("old", "new"), [("refuse", "error"), ("cut", "truncate")])
def test_renamed_values_are_accepted_with_a_warning(tmp_path, old, new):
    path = write(tmp_path, f"data: {{oversized_samples: {old}}}\n")
    with pytest.warns(FutureWarning, match=f"{path}: data.oversized_samples: '{old}' was renamed to '{new}'"):
        assert load_recipe(path).data.oversized_samples == new
    with pytest.warns(FutureWarning, match=f"--oversized-samples: '{old}' was renamed to '{new}'"):
        assert parse_command_line(["--oversized-samples", old])[0].data.oversized_samples == new


def test_a_checkpoint_with_renamed_values_is_read_without_a_warning(recwarn):
    assert recipe_from_dict({"data": {"oversized_samples": "cut"}}).data.oversized_samples == "truncate"
    assert not recwarn


def test_recipes_share_no_lists():
    first = load_recipe(None)
    first.training.trainable.append("everything")
    first.model.image_grid_pinpoints[0][0] = 0
    assert load_recipe(None) == Recipe()
    assert recipe_to_dict(first)["training"]["trainable"] is not first.training.trainable


def test_data_parallel_size():
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    assert parallel.data_parallel_size(8) == 2
    for world_size in (0, 2, 6):
        with pytest.raises(ConfigError, match="not a multiple of the 4 processes"):
            parallel.data_parallel_size(world_size)


def test_settings_are_read_without_torch():
    code = "import sys, megatron_vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
