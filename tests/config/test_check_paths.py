"""Missing paths, files instead of folders, and unknown file types."""

from __future__ import annotations

import pytest

from megatron_vlm.config import ConfigError, Recipe, check_paths


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose paths all exist."""
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "shards").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    recipe = Recipe()
    recipe.data.data_path = [str(tmp_path / "train.json"), str(tmp_path / "shards"), "s3://bucket/shards"]
    recipe.data.cache_dir, recipe.data.cache_limit = str(tmp_path), "100gb"
    recipe.data.tokenizer_model = str(tmp_path / "tokenizer")
    recipe.data.image_folder = str(tmp_path)
    recipe.training.load = recipe.training.pretrained_checkpoint = str(tmp_path)
    recipe.training.save = str(tmp_path / "new")
    return recipe


def test_existing_paths_pass(recipe, tmp_path):
    check_paths(recipe)
    (tmp_path / "new").mkdir()
    recipe.data.image_folder = "s3://bucket/images"
    recipe.training.save = recipe.training.load = recipe.training.pretrained_checkpoint = "s3://bucket/run"
    check_paths(recipe)
    (tmp_path / "bpe.model").write_bytes(b"")
    recipe.data.tokenizer_model = str(tmp_path / "bpe.model")
    check_paths(recipe)


def test_lists_of_files_and_the_hub(recipe, tmp_path):
    for name in ("a_0.json.gz", "a_1.json.gz", "b.json_new", "c-00.parquet", "d.tar"):
        (tmp_path / name).touch()
    names = ("a_{0..1}.json.gz", "{b,b}.json_new", "c-*.parquet", "d.tar")
    recipe.data.data_path = [*(str(tmp_path / name) for name in names), "hf://datasets/org/name"]
    recipe.data.cache_dir = recipe.data.cache_limit = None
    check_paths(recipe)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("data", "data_path", [], "no data"),
        ("data", "cache_limit", "much", "not a size"),
        ("data", "data_root", "{}/absent", "no such folder"),
        ("data", "data_path", ["{}/trian.json"], "Did you mean {}/train.json?"),
        ("data", "data_path", ["{}/missing/train.json"], "{}/missing does not exist"),
        ("data", "data_path", ["{}/notes.txt"], "unknown file type (.txt)"),
        ("data", "data_path", ["{}/{{train,trian}}.json"], "Did you mean {}/train.json?"),
        ("data", "data_path", ["{}/a_{{3..1}}.json"], "is empty. Correct the path"),
        ("data", "data_path", ["{}/a_*.json"], "no file matches {}/a_*.json. Correct the path"),
        ("data", "image_folder", "{}/images", "no such folder"),
        ("data", "image_folder", "{}/notes.txt", "not a folder"),
        ("data", "tokenizer_model", "", "no tokenizer"),
        ("data", "tokenizer_model", "{}/tokeniser", "Did you mean {}/tokenizer?"),
        ("data", "tokenizer_model", "{}/shards", "without tokenizer.json"),
        ("data", "tokenizer_model", "{}/notes.txt", "does not end in .model"),
        ("training", "load", "{}/checkpoint", "no such folder"),
        ("training", "pretrained_checkpoint", "{}/checkpoint", "no such folder"),
        ("training", "save", "{}/notes.txt", "a file, not a folder"),
        ("training", "save", "gs://bucket/run", "Use s3://bucket/prefix"),
        ("training", "load", "s3://", "Use s3://bucket/prefix"),
    ],
)
def test_each_wrong_path_is_reported_with_a_remedy(recipe, tmp_path, section, name, value, message):
    here = str(tmp_path)
    filled = [item.format(here) for item in value] if isinstance(value, list) else value.format(here)
    setattr(getattr(recipe, section), name, filled)
    with pytest.raises(ConfigError) as caught:
        check_paths(recipe)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{section}.{name} = ")
    assert message.format(here) in problem


def test_all_wrong_paths_are_reported_together(recipe):
    recipe.data.data_path = ["/nowhere/a.json", "/nowhere/b.json"]
    recipe.data.tokenizer_model = "/nowhere/tokenizer"
    with pytest.raises(ConfigError) as caught:
        check_paths(recipe)
    assert len(caught.value.problems) == 3


def test_shards_of_s3_need_a_cache_folder(recipe):
    recipe.data.cache_dir = None
    with pytest.raises(ConfigError, match="cache_dir = nothing: not set, but shards of s3://bucket/shards are cached"):
        check_paths(recipe)
