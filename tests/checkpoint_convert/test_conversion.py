"""Whole conversions, folder to folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.safetensors import FolderTensors, write_weights
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.training.checkpoint import read_recipe
from tests.support.random_models import (
    GROUPED_QUERY_SIZES,
    LANGUAGE_SIZES,
    clip_vision_model,
    olmo_model,
    write_llava_next,
)


def _round_trip(arguments: list[str], folder: Path) -> Path:
    assert hf_to_megatron.main([*arguments, "--save", str(folder / "megatron")]) == 0
    load, save = str(folder / "megatron"), str(folder / "exported")
    assert megatron_to_hf.main(["--load", load, "--save", save, "--format", "llava_next"]) == 0
    return folder / "exported"


@pytest.mark.parametrize(
    ("language", "dtype"),
    [(LANGUAGE_SIZES, torch.float32), (GROUPED_QUERY_SIZES, torch.bfloat16)],
    ids=["fp32", "bf16"],
)
def test_whole_model_round_trip_is_bit_for_bit(tmp_path: Path, language: dict[str, int], dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    write_llava_next(source, language=language).to(dtype).save_pretrained(source)
    exported = _round_trip(["--model", str(source)], tmp_path)
    before, after = FolderTensors(source, "llava"), load_file(exported / "model.safetensors")
    assert sorted(before) == sorted(after), "the exported names are those that transformers 4 writes"
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name]), name
    config = json.loads((exported / "config.json").read_text())
    assert config["image_grid_pinpoints"] == json.loads((source / "config.json").read_text())["image_grid_pinpoints"]

    # An export can be imported again; the image token is removed from its tokenizer.
    assert hf_to_megatron.main(["--model", str(exported), "--save", str(tmp_path / "again")]) == 0
    again, first_time = read_recipe(tmp_path / "again"), read_recipe(tmp_path / "megatron")
    assert again.model == first_time.model
    assert load_tokenizer(tmp_path / "again" / "tokenizer").fingerprint == load_tokenizer(source).fingerprint


def test_round_trip_of_a_tower_and_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision, language = tmp_path / "clip", tmp_path / "olmo"
    tower, decoder = clip_vision_model(), olmo_model()
    decoder.save_pretrained(language)
    write_tokenizer(language)
    # as OpenAI's CLIP is published: with its text tower in one pickled file, and the tower's config inside CLIP's
    vision.mkdir()
    config = {"model_type": "clip", "vision_config": tower.config.to_dict(), "text_config": {}}
    (vision / "config.json").write_text(json.dumps(config))
    towers = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    towers |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.bias": torch.ones(3)}
    torch.save(towers, vision / "pytorch_model.bin")

    arguments = ["--vision-model", str(vision), "--language-model", str(language)]
    exported = load_file(_round_trip(arguments, tmp_path) / "model.safetensors")
    output = capsys.readouterr().out
    assert "randomly initialised, to be trained: image_newline, projector.linear_1.bias" in output
    for name, tensor in tower.state_dict().items():
        assert torch.equal(exported.pop(f"vision_tower.vision_model.{name}"), tensor), name
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(exported.pop(f"language_model.model.{name}"), tensor), name
    assert sorted(exported) == [
        "image_newline",
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.weight",
    ]
    assert exported["multi_modal_projector.linear_1.weight"].std() > 0.01
    assert read_recipe(tmp_path / "megatron").model.image_token_index == 270


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    tensors = {f"image_newline.{number}": torch.randn(10, 10) for number in range(7)}
    write_weights(tensors.items(), tmp_path, shard_bytes=1000)
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    read = FolderTensors(tmp_path, "llava")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert len(read) == 7


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM = "vision_tower.pre_layrnorm.bias"
WRONG = {
    "missing key": (
        _edit_weights(lambda t: t.pop(NORM)),
        "missing tensors:\n  vision_tower.vision_model.pre_layrnorm.bias",
    ),
    "extra key": (_edit_weights(lambda t: t.update(surplus=torch.ones(2))), "unexpected tensors:\n  surplus"),
    "wrong shape": (_edit_weights(lambda t: t.update({NORM: torch.ones(5)})), "(5,), the config says (48,)"),
    "truncated": (_truncate, "model.safetensors cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a model: it has neither config.json"),
    "other model": (_edit_config(model_type="llava"), "model_type is 'llava'; supported: 'llava_next'"),
    "other decoder": (
        _edit_config(text_config__model_type="gemma"),
        "model_type is 'gemma'; supported: 'olmo', 'llama'",
    ),
    "clipped qkv": (_edit_config(text_config__clip_qkv=8.0), "clip_qkv is 8.0; supported: None"),
    "full features": (_edit_config(vision_feature_select_strategy="full"), "'full'; supported: 'default'"),
    "no such layer": (_edit_config(vision_feature_layer=-9), "vision_feature_layer is -9; the tower has 5 layers"),
    "other image token": (_edit_config(image_token_index=275), "image_token_index of"),
    "small vocabulary": (_edit_config(text_config__vocab_size=269), "270 tokens and the embedding of"),
    "longer tokenizer": (lambda folder: write_tokenizer(folder, 290) and None, "290 tokens and the embedding of"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "give one with --tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}") and None, "cannot be used"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_llava_next(folder)
    return folder


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_message_and_leaves_nothing(
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sound, source)
    damage(source)
    assert hf_to_megatron.main(["--model", str(source), "--save", str(tmp_path / "saved")]) == 1
    reported = capsys.readouterr().err
    assert reported.count("error: ") == 1
    assert message in reported
    assert str(source) in reported or "tokenizer" in reported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_nothing_is_overwritten(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("x")
    assert hf_to_megatron.main(["--model", str(sound), "--save", str(tmp_path)]) == 1
    assert "already exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_export_of_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = ["--save", str(tmp_path / "saved"), "--format", "llava_next"]
    assert megatron_to_hf.main(["--load", str(tmp_path), *save]) == 1
    assert "no finished checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("arguments", [[], ["--vision-model", "a"], ["--model", "a", "--language-model", "b"]])
def test_incomplete_command_line_is_rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        hf_to_megatron.main([*arguments, "--save", "nowhere"])
    assert stopped.value.code == 2
    assert "either --model, or --vision-model and --language-model" in capsys.readouterr().err
