"""`megatron-vlm init`: what it writes can be trained, and what cannot be is not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.support.random_tokenizer import write_tokenizer
from megatron_vlm.config import Recipe, load_recipe
from megatron_vlm.config.recipe import iter_settings
from megatron_vlm.new_recipe.init import main
from tests.data.helpers import Folder, mixed_folder
from tests.support.random_models import clip_vision_model, olmo_model, write_llava_next


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder of data as the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = mixed_folder(tmp_path, 40)
    folder.write("train.json")
    return folder


def init(*arguments: str) -> int:
    return main(["--data", "train.json", "--image-folder", "images", "--output", "new", *arguments])


def test_from_random_weights(data: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--from-scratch", "tiny", "--epochs", "4") == 0
    out = capsys.readouterr().out
    assert "40 samples, 40 usable" in out and "4.00 epochs" in out and "plan --config new/recipe.yaml" in out
    recipe = load_recipe("new/recipe.yaml")
    assert sorted(path.name for path in Path("new").iterdir()) == ["recipe.yaml", "tokenizer"]
    assert (recipe.training.epochs, recipe.training.save, recipe.data.valid_share) == (4, "new/run", 0)
    assert recipe.data.image_aspect_ratio == "anyres"  # with another one, its export would see other inputs
    vocabulary = recipe.model.image_token_index
    assert vocabulary < recipe.model.language.vocab_size
    text = Path("new/recipe.yaml").read_text()
    names = {setting.key.rpartition(".")[2] for setting in iter_settings(Recipe())}
    for line in text.splitlines():  # every setting is one, and every section has a heading
        name = line.strip().partition(":")[0]
        assert line.startswith("#") or name in {*names, "data", "training", "model", "vision", "language"}, line


def test_a_whole_model(data: Folder) -> None:
    model = write_llava_next(data.root / "model")
    assert init("--model", "model", "--valid-data", "train.json") == 0
    recipe = load_recipe("new/recipe.yaml")
    assert recipe.training.pretrained_checkpoint == "model" == recipe.data.tokenizer_model
    assert recipe.model.language.hidden_size == model.config.text_config.hidden_size
    assert recipe.model.image_token_index == model.config.image_token_index
    assert recipe.data.valid_data_path == ["train.json"] and recipe.training.best_metric == "eval_loss"


def test_a_tower_and_a_language_model_take_two_stages(data: Folder) -> None:
    clip_vision_model().save_pretrained("tower")
    olmo_model().save_pretrained("decoder")
    write_tokenizer(Path("decoder"))
    assert init("--vision-model", "tower", "--language-model", "decoder") == 0
    first, second = load_recipe("new/projector.yaml"), load_recipe("new/instruct.yaml")
    assert (first.training.trainable, first.training.epochs) == (["projector"], 1)
    assert first.training.pretrained_checkpoint == "new/start" and Path("new/start/tokenizer").is_dir()
    assert second.training.pretrained_checkpoint == first.training.save == "new/projector"
    assert second.training.trainable == ["vision", "projector", "language"] and second.model == first.model


WRONG = {
    "no data": (["--data", "absent.json", "--from-scratch", "tiny"], "absent.json"),
    "a table": (["--data", "train.csv", "--from-scratch", "tiny"], "convert-dataset qa --input train.csv"),
    "no usable sample": (["--data", "bad.json", "--from-scratch", "tiny"], "none of 1 samples of bad.json is usable"),
    "no model": (["--model", "absent"], "absent is not a model"),
    "a language model alone": (["--model", "decoder"], "--vision-model and --language-model"),
    "a tower for a decoder": (["--vision-model", "decoder", "--language-model", "decoder"], "has no vision tower"),
    "no validation data": (["--from-scratch", "tiny", "--valid-data", "gone.json"], "gone.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_not_written(case: str, data: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    Path("train.csv").write_text("image,question,answer\n")
    Path("bad.json").write_text('[{"id": "1", "conversations": []}]')
    if "decoder" in arguments:
        olmo_model().save_pretrained("decoder")
        write_tokenizer(Path("decoder"))
    assert init(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Nothing was written" in error and "Traceback" not in error
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--vision-model", "a"],
        ["--model", "a", "--from-scratch", "tiny"],
        ["--from-scratch", "tiny", "--epochs", "0"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], data: Folder) -> None:
    with pytest.raises(SystemExit, match="2"):
        init(*arguments)


def test_nothing_is_overwritten(data: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    Path("new").mkdir()
    Path("new/mine").touch()
    assert init("--from-scratch", "tiny") == 2
    assert "already exists" in capsys.readouterr().err and Path("new/mine").exists()
