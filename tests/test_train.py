"""`megatron_vlm.train` with a Hugging Face folder as `pretrained_checkpoint`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from checkpoint_convert.hf_to_megatron import convert_vlm
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
            "image_grid_pinpoints": GRID_PINPOINTS,
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


def test_a_hugging_face_folder_is_converted_first(recipe: Path, tmp_path: Path) -> None:
    convert_vlm(recipe.parent / "hf", tmp_path / "imported")
    run(recipe, tmp_path / "imported_run", "--pretrained-checkpoint", str(tmp_path / "imported"))
    first = run(recipe, tmp_path / "save", ranks=2)
    target = tmp_path / "save" / "pretrained"
    assert first.stdout.count("converting") == 1 and f"starting from the weights of {target}" in first.stdout
    assert losses(tmp_path / "save") == pytest.approx(losses(tmp_path / "imported_run"), rel=1e-5)

    again = run(recipe, tmp_path / "save", "--train-iters", "3")
    assert "converting" not in again.stdout and "resuming after iteration 2" in again.stdout


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
