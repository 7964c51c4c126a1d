"""The command line end to end: parallel layouts agree, a run resumes in another layout, wrong input is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.helpers import tiny_tokenizer_folder
from tests.training.tiny_run import LAYOUTS, metrics, run, write_recipe

EQUAL = 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a recipe and its run at TP 2, saved after iterations 3 and 6."""
    folder = tmp_path_factory.mktemp("train")
    recipe = write_recipe(folder, save_interval=3)
    run(recipe, folder / "tp2", *LAYOUTS["tp2"], ranks=2)
    return folder


def _assert_equal(lines: list[dict[str, Any]], expected_lines: list[dict[str, Any]]) -> None:
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line["iteration"] == expected["iteration"]
        for exact in ("tokens", "loss_tokens", "tiles", "learning_rate"):
            assert line[exact] == expected[exact], exact
        assert line["lm_loss"] == pytest.approx(expected["lm_loss"], rel=EQUAL)


def test_metrics_have_all_keys(work: Path) -> None:
    for line in metrics(work / "tp2"):
        assert {
            "iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "tiles", "pack_fill",
            "tokens_per_second", "data_wait_ms",
        } <= line.keys()  # fmt: skip
        assert 0.5 < line["pack_fill"] <= 1
        assert 0 < line["loss_tokens"] < line["tokens"]


@pytest.mark.full
def test_eight_ranks_have_the_losses_of_one_process(work: Path) -> None:
    run(work / "recipe.yaml", work / "one")
    flags = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--context-parallel-size", "2")
    run(work / "recipe.yaml", work / "eight", *flags, ranks=8)
    _assert_equal(metrics(work / "eight"), metrics(work / "one"))
    _assert_equal(metrics(work / "tp2"), metrics(work / "one"))


FULL = pytest.mark.full


@pytest.mark.parametrize("layout", ["pp2", pytest.param("cp2", marks=FULL), pytest.param("dp2", marks=FULL)])
def test_checkpoint_of_tp2_resumes_in_another_layout(work: Path, layout: str) -> None:
    """Weights, optimizer, schedule and order of rows: the losses are those of the uninterrupted run."""
    stopped = work / f"stopped_{layout}"
    shutil.copytree(work / "tp2", stopped)
    (stopped / "latest_checkpointed_iteration.txt").write_text("3")
    run(work / "recipe.yaml", stopped, *LAYOUTS[layout], ranks=2)
    _assert_equal(metrics(stopped), metrics(work / "tp2"))


def test_a_stage_starts_from_the_weights_of_another(work: Path) -> None:
    """A projector warm-up from a full checkpoint in another layout, with no trainable parameter on the second stage."""
    flags = ("--pretrained-checkpoint", str(work / "tp2"), "--trainable", "projector", "--train-iters", "2")
    done = run(work / "recipe.yaml", work / "warm", *flags, *LAYOUTS["pp2"], ranks=2)
    assert "starting from the weights of" in done.stdout
    again = run(work / "recipe.yaml", work / "warm", *flags, "--train-iters", "3", *LAYOUTS["tp2"], ranks=2)
    assert "resuming after iteration 2" in again.stdout


def test_wrong_tokenizer_is_rejected(work: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer_folder(tmp_path / "other")
    description = json.loads((other / "tokenizer.json").read_text())
    description["added_tokens"][0]["content"] = "<|another|>"
    description["model"]["vocab"]["<|another|>"] = description["model"]["vocab"].pop("<|padding|>")
    (other / "tokenizer.json").write_text(json.dumps(description))
    (other / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "|||IP_ADDRESS|||", "pad_token": "<|another|>"})
    )
    flags = ("--tokenizer-model", str(other), "--pretrained-checkpoint", str(work / "tp2"))
    done = run(work / "recipe.yaml", None, *flags, check=False)
    assert done.returncode == 1
    assert "was trained with another tokenizer" in done.stdout and "Traceback" not in done.stdout


def test_wrong_model_and_missing_checkpoint_are_rejected(work: Path) -> None:
    flags = ("--pretrained-checkpoint", str(work / "tp2"), "--model.language.intermediate-size", "80")
    done = run(work / "recipe.yaml", None, *flags, check=False)
    assert done.returncode == 1 and "intermediate_size is 80 here and 72 there" in done.stdout
    done = run(work / "recipe.yaml", None, "--load", str(work / "data"), check=False)
    assert done.returncode != 0 and "no finished checkpoint" in done.stdout
