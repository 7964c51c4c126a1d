"""The recipes of the demo and of the full-size stages are valid, and each stage starts from the previous one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm import train
from megatron_vlm.config import Recipe, check_recipe, load_recipe, recipe_to_dict
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.examples.conftest import EXAMPLES

STAGES = ("warmup", "pretrain", "instruct")
DEMO_STAGES = ("language", *STAGES)


def recipes(folder: Path, stages: tuple[str, ...] = STAGES) -> list[Recipe]:
    return [load_recipe(folder / f"{stage}.yaml") for stage in stages]


ALL_PARTS = ["vision", "projector", "language"]


@pytest.mark.parametrize(
    ("folder", "stages", "world", "trainable"),
    [
        (EXAMPLES / "demo", DEMO_STAGES, 2, [["language"], ["vision", "projector"], ALL_PARTS, ALL_PARTS]),
        (EXAMPLES, STAGES, 8, [["projector"], ALL_PARTS, ALL_PARTS]),
    ],
    ids=["demo", "real"],
)
def test_stages_are_valid_and_consecutive(
    folder: Path, stages: tuple[str, ...], world: int, trainable: list[list[str]]
) -> None:
    loaded = recipes(folder, stages)
    for recipe in loaded:
        check_recipe(recipe, world)
        assert recipe_to_dict(recipe)["model"] == recipe_to_dict(loaded[0])["model"]
    for previous, stage in zip(loaded, loaded[1:], strict=False):
        # language.yaml is used twice: run.py saves the second time as `negations`.
        saved = str(previous.training.save).replace("/language", "/negations")
        assert stage.training.pretrained_checkpoint == saved
    assert [recipe.training.trainable for recipe in loaded] == trainable


def test_demo_stages_have_different_layouts() -> None:
    layouts = [
        (recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size)
        for recipe in recipes(EXAMPLES / "demo", DEMO_STAGES)
    ]
    assert layouts == [(1, 1), (1, 1), (1, 1), (1, 2)]


def test_demo_model_matches_its_tokenizer_and_images(trained_tokenizer: Path) -> None:
    for recipe in recipes(EXAMPLES / "demo", DEMO_STAGES):
        model = recipe.model
        assert model.image_token_index == len(load_tokenizer(trained_tokenizer)) < model.language.vocab_size
        assert (
            0
            < num_image_tokens((64, 64), ImageGeometry.of(model, recipe.data.image_aspect_ratio))
            < recipe.data.seq_length // 4
        )
        assert model.vision.num_layers_used == model.vision.num_hidden_layers - 1


def test_evaluation_imports_nothing_of_this_project() -> None:
    script = (
        "import sys, evaluate; ours = {name.split('.')[0] for name in sys.modules}; "
        "print(*sorted(ours & {'megatron', 'megatron_vlm', 'checkpoint_convert', 'streaming'}))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, cwd=EXAMPLES / "demo", capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_without_data_says_what_the_recipe_alone_decides(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, memory, tokens and days; then which files are missing."""
    steps = ["--epochs", "none", "--train-iters", "47800"] if stage == "instruct" else []
    assert train.main(["--config", str(EXAMPLES / f"{stage}.yaml"), "--dry-run", *steps]) == 2
    printed = capsys.readouterr()
    assert ("= 25.06 B" if steps else "epochs are as many steps as the data fills") in printed.out
    for start in ("model      1.474 B", "memory     ", "tokens     ", "time       8 x MI300X", "time       8 x H100"):
        assert any(line.startswith(start) for line in printed.out.splitlines()), start
    assert "checkpoints/start" in printed.err
