"""`--dry-run` says what a run starts from, and what is wrong with it, from metadata alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.support.random_folder import write_random_folder
from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.hf_to_megatron import convert_vlm
from checkpoint_convert.initial_weights import describe_start
from checkpoint_convert.model_config import complete_recipe
from megatron_vlm import train
from megatron_vlm.config import Recipe, recipe_from_dict
from megatron_vlm.data.errors import DataError
from megatron_vlm.training.checkpoint import CheckpointError
from tests.data.helpers import tiny_tokenizer_folder
from tests.support.s3_server import BUCKET, Proxy, put_folder
from tests.training.tiny_run import MODEL, write_recipe

CHECKPOINT = "iter_0000000"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` and `megatron`, the same model."""
    folder = tmp_path_factory.mktemp("sound")
    model = recipe_from_dict({"model": MODEL}).model
    model.image_token_index = write_tokenizer(folder / "tokenizer")
    write_random_folder(folder / "hf", folder / "tokenizer", model, torch.float32)
    convert_vlm(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def inputs(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in ("hf", "megatron"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path


def starting_from(source: str | Path) -> Recipe:
    """A recipe that takes model and tokenizer from `source`, where it can be read."""
    recipe = Recipe()
    recipe.training.pretrained_checkpoint = str(source)
    complete_recipe(recipe, set())
    return recipe


def test_what_fits(sound: Path) -> None:
    assert describe_start(starting_from(sound / "hf")).startswith(f"the weights of {sound / 'hf'} (llava_next), which")
    recipe = starting_from(sound / "megatron")
    assert describe_start(recipe) == f"the weights of {sound / 'megatron' / CHECKPOINT}, iteration 0"
    recipe.training.pretrained_checkpoint = None
    assert describe_start(recipe) == "random weights, seed 42"


def test_in_an_object_store(sound: Path, one_store: Proxy) -> None:
    """Files are measured there; none of tensors is read."""
    url = f"s3://{BUCKET}/initial"
    put_folder(sound / "megatron", url)
    recipe = starting_from(sound / "megatron")
    recipe.training.pretrained_checkpoint = url
    one_store.requests.clear()
    assert describe_start(recipe) == f"the weights of {url}/{CHECKPOINT}, iteration 0"
    read = [path for method, path in one_store.requests if method == "GET" and path.endswith(".distcp")]
    common = sound / "megatron" / CHECKPOINT / "common.pt"
    assert len(read) == (0 if common.is_file() else 1)  # megatron-core 0.19 keeps where the run stood in a .distcp file
    recipe.training.pretrained_checkpoint = "s3://absent/run"
    with pytest.raises(CheckpointError, match=r"training.pretrained_checkpoint: .*s3://absent/run.*NoSuchBucket"):
        describe_start(recipe)


def _empty(inputs: Path, recipe: Recipe) -> None:
    shutil.rmtree(inputs / "megatron")
    (inputs / "megatron").mkdir()


def _unfinished(inputs: Path, recipe: Recipe) -> None:
    (inputs / "megatron" / CHECKPOINT / "recipe.json").unlink()


def _truncated(inputs: Path, recipe: Recipe) -> None:
    file = next((inputs / "megatron" / CHECKPOINT).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5000])


def _rank_lost(inputs: Path, recipe: Recipe) -> None:
    next((inputs / "megatron" / CHECKPOINT).glob("*.distcp")).unlink()


def _other_model(inputs: Path, recipe: Recipe) -> None:
    recipe.model.language.num_hidden_layers += 1


def _other_shapes(inputs: Path, recipe: Recipe) -> None:
    """recipe.json says so, too."""
    file = inputs / "megatron" / CHECKPOINT / "recipe.json"
    stored = json.loads(file.read_text())
    stored["recipe"]["model"]["language"]["intermediate_size"] += 8
    file.write_text(json.dumps(stored))
    recipe.model.language.intermediate_size += 8


def _other_tokenizer(inputs: Path, recipe: Recipe) -> None:
    recipe.data.tokenizer_model = str(tiny_tokenizer_folder(inputs / "other"))


CHECKPOINTS: dict[Callable[[Path, Recipe], None], str] = {
    _empty: "megatron holds no finished checkpoint",
    _unfinished: "no checkpoint in .*megatron is whole",
    _truncated: r"\.distcp has [\d,]+ bytes and [\d,]+ are needed",
    _rank_lost: r"\.distcp does not exist: copy the checkpoint again",
    _other_model: "model.language.num_hidden_layers is 5 here and 4 there",
    _other_shapes: "(?s)tensors of another shape.*linear_fc1.weight",
    _other_tokenizer: "trained with another tokenizer",
}


def _truncated_weights(inputs: Path, recipe: Recipe) -> None:
    file = next((inputs / "hf").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5000])


def _only_a_part(inputs: Path, recipe: Recipe) -> None:
    config = json.loads((inputs / "hf" / "config.json").read_text())
    (inputs / "hf" / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "llama"}))


FOLDERS: dict[Callable[[Path, Recipe], None], str] = {
    _truncated_weights: "safetensors",
    _only_a_part: "not a Hugging Face folder of a whole VLM",
    _other_model: "model.language.num_hidden_layers is 5 here and 4 there",
    _other_tokenizer: "trained with another tokenizer",
}


CASES = [
    pytest.param(folder, change, message, id=f"{folder}-{change.__name__[1:]}")
    for folder, changes in (("megatron", CHECKPOINTS), ("hf", FOLDERS))
    for change, message in changes.items()
]


@pytest.mark.parametrize(("folder", "change", "message"), CASES)
def test_what_does_not_fit(inputs: Path, folder: str, change: Callable[[Path, Recipe], None], message: str) -> None:
    recipe = starting_from(inputs / folder)
    change(inputs, recipe)
    with pytest.raises((CheckpointError, ConversionError), match=message):
        describe_start(recipe)


def test_the_command(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails before the data is opened; without --save there is nowhere to convert a folder into."""

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(train, "_fail", fail)
    recipe = ["--config", str(write_recipe(tmp_path)), "--dry-run", "--pretrained-checkpoint"]
    with pytest.raises(CheckpointError, match="model.image_token_index is 500 here, 270 there"):
        train.main([*recipe, str(sound / "megatron")])
    with pytest.raises(DataError, match="there is no folder of --save to convert it into"):
        train.main([*recipe, str(sound / "hf")])
    assert not list((tmp_path / "data").rglob("*.arrays")), "lengths were measured"
