"""`megatron_vlm.train` with a Hugging Face folder as `pretrained_checkpoint`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from checkpoint_convert.hf_to_megatron import convert_vlm
from checkpoint_convert.megatron_to_hf import convert
from checkpoint_convert.model_config import complete_recipe
from megatron_vlm.config import Recipe, parse_command_line
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.training.checkpoint import read_recipe
from tests.data.helpers import mixed_folder
from tests.support.random_models import GRID_PINPOINTS, LANGUAGE_SIZES, VISION_SIZES, write_llava_next
from tests.training.tiny_run import metrics, run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose model and tokenizer are those of the Hugging Face folder HF beside it."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_llava_next(folder / "hf")
    data = mixed_folder(folder / "data")
    settings = {
        "model": {
            "vision": VISION_SIZES,
            "language": LANGUAGE_SIZES,
            "image_token_index": 270,
            "image_grid_pinpoints": [[width, height] for height, width in GRID_PINPOINTS],
        },
        "data": {
            "data_path": [str(data.write())],
            "image_folder": str(data.images),
            "tokenizer_model": str(folder / "hf"),
            "seq_length": 384,
            "max_tiles_per_row": 24,
        },
        "training": {"train_iters": 2, "global_batch_size": 2, "pretrained_checkpoint": str(folder / "hf")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(save: Path) -> list[float]:
    return [line["lm_loss"] for line in metrics(save) if "lm_loss" in line]


@pytest.fixture(scope="module")
def short_recipe(recipe: Path) -> Path:
    """The same recipe with only what differs from the folder: no model and no tokenizer."""
    settings = yaml.safe_load(recipe.read_text())
    del settings["model"], settings["data"]["tokenizer_model"]
    path = recipe.with_name("short.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_hugging_face_folder_is_converted_first(recipe: Path, short_recipe: Path, tmp_path: Path) -> None:
    convert_vlm(recipe.parent / "hf", tmp_path / "imported")
    run(recipe, tmp_path / "imported_run", "--pretrained-checkpoint", str(tmp_path / "imported"))
    first = run(short_recipe, tmp_path / "save", ranks=2)
    target = tmp_path / "save" / "pretrained"
    assert first.stdout.count("converting") == 1 and f"starting from the weights of {target}" in first.stdout
    assert losses(tmp_path / "save") == pytest.approx(losses(tmp_path / "imported_run"), rel=1e-5)

    stored = read_recipe(tmp_path / "save")
    assert stored.model == read_recipe(tmp_path / "imported_run").model
    assert stored.data.tokenizer_model == str(target / "tokenizer")

    again = run(short_recipe, tmp_path / "save", "--train-iters", "3")
    assert "converting" not in again.stdout and "resuming after iteration 2" in again.stdout


def completed(*arguments: str) -> Recipe:
    recipe, options = parse_command_line(arguments)
    complete_recipe(recipe, options.given)
    return recipe


def test_the_model_and_the_tokenizer_come_from_the_checkpoint(recipe: Path, short_recipe: Path, tmp_path: Path) -> None:
    hf, whole = recipe.parent / "hf", completed("--config", str(recipe))
    short = completed("--config", str(short_recipe))
    assert short.model == whole.model and short.data.tokenizer_model == str(hf)
    convert_vlm(hf, tmp_path / "megatron")
    short = completed("--config", str(short_recipe), "--pretrained-checkpoint", str(tmp_path / "megatron"))
    assert short.model == whole.model
    assert short.data.tokenizer_model == str(tmp_path / "megatron" / "tokenizer")
    flags = ("--model.language.max-position-embeddings", "99", "--tokenizer-model", "elsewhere")
    short = completed("--config", str(short_recipe), *flags)
    assert short.model.language.max_position_embeddings == 99 and short.data.tokenizer_model == "elsewhere"
    assert short.model.vision == whole.model.vision


def test_the_image_token_is_the_tokenizers_next_id(recipe: Path, tmp_path: Path) -> None:
    """There an export has its `<image>`, also if it is trained again."""
    convert_vlm(recipe.parent / "hf", tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "exported", format="llava_next")
    for folder in (recipe.parent / "hf", tmp_path / "exported"):
        assert completed("--tokenizer-model", str(folder)).model.image_token_index == 270
    a, b = load_tokenizer(tmp_path / "exported"), load_tokenizer(tmp_path / "megatron" / "tokenizer")
    assert (a.fingerprint, len(a)) == (b.fingerprint, len(b))
    assert completed().model.image_token_index == completed("--tokenizer-model", "absent").model.image_token_index


def test_without_save_the_answer_is_the_command(recipe: Path) -> None:
    done = run(recipe, None, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert f"megatron-vlm import --model {recipe.parent / 'hf'} --save DIR" in done.stdout


def test_a_folder_that_is_not_a_vlm(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    done = run(recipe, tmp_path / "save", "--pretrained-checkpoint", str(tmp_path / "other"), ranks=2, check=False)
    assert done.returncode == 1 and "could not be converted; the reason is printed above" in done.stdout
    assert "error: " in done.stdout
    assert not (tmp_path / "save" / "pretrained").exists()
