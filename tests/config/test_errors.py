"""The message of ConfigError, and suggestions for misspelled names."""

from __future__ import annotations

from megatron_vlm.config.errors import ConfigError, nearest, nearest_key


def test_problems_are_numbered():
    assert str(ConfigError(["a.", "b."])) == "2 problems in the settings:\n  1. a.\n  2. b."


def test_a_single_string_is_a_single_problem():
    error = ConfigError("a.")
    assert str(error) == "1 problem in the settings:\n  1. a."
    assert error.problems == ["a."]


def test_nearest():
    assert nearest("trian_iters", ["lr", "train_iters", "seed"]) == "train_iters"
    assert nearest("qqqq", ["lr", "train_iters"]) is None


def test_nearest_key_compares_the_name_first_and_then_the_section():
    keys = ["training.lr", "model.vision.hidden_size", "model.language.hidden_size"]
    assert nearest_key("model.language.hiden_size", keys) == "model.language.hidden_size"
    assert nearest_key("data.lr", keys) == "training.lr"
    assert nearest_key("qqqq", keys) is None
