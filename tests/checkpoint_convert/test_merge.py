"""Parts of different checkpoints as one model, and a projector alone between two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf, merge
from checkpoint_convert.model_source import open_source
from megatron_vlm.training.checkpoint import read_recipe
from tests.support.random_models import (
    GROUPED_QUERY_SIZES,
    LANGUAGE_SIZES,
    SIGLIP_SIZES,
    VISION_SIZES,
    clip_vision_model,
    llava_next_model,
    olmo_model,
    write_llava_next,
)

PROJECTOR = "multi_modal_projector."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole VLM as a Hugging Face folder and as a checkpoint, another with other weights, a tower and a decoder."""
    root = tmp_path_factory.mktemp("parts")
    write_llava_next(root / "first", seed=11)
    write_llava_next(root / "second", seed=12, pinpoints=[[28, 28], [56, 28]])
    assert hf_to_megatron.main(["--model", str(root / "second"), "--save", str(root / "megatron")]) == 0
    clip_vision_model().save_pretrained(root / "clip")
    olmo_model().save_pretrained(root / "olmo")
    write_tokenizer(root / "olmo")
    return {name: root / name for name in ("first", "second", "megatron", "clip", "olmo")}


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, under the names of an export."""
    return dict(open_source(checkpoint).tensors)


def _original(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder that transformers 5 wrote, under the names of an export."""
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        new = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        renamed[new if "vision_model.vision_model" not in new else name] = tensor
    return renamed


def test_parts_of_three_checkpoints(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tower of a Hugging Face folder, the projector of a Megatron checkpoint, a language model alone."""
    arguments = ["--vision", models["first"], "--projector", models["megatron"], "--language", models["olmo"]]
    assert merge.main([*map(str, arguments), "--save", str(tmp_path / "merged")]) == 0
    assert "randomly initialised" not in capsys.readouterr().out
    exported = _tensors(tmp_path / "merged")
    decoder = olmo_model().model.state_dict()
    for name, tensor in exported.items():
        if name.startswith("language_model."):
            wanted = decoder[name.removeprefix("language_model.model.")]
        else:
            wanted = _original(models["second" if name.startswith((PROJECTOR, "image_newline")) else "first"])[name]
        assert torch.equal(tensor, wanted), name
    model = read_recipe(tmp_path / "merged").model
    assert model.image_grid_pinpoints == [[28, 28], [28, 56]], "images are tiled as in the projector's model"


def _llava_file(folder: Path, file: Path, prefix: str = "model.", newline: bool = True) -> None:
    """mm_projector.bin as LLaVA's training writes it."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith(PROJECTOR):
            number, kind = name.removeprefix(PROJECTOR + "linear_").split(".")
            tensors[f"{prefix}mm_projector.{2 * int(number) - 2}.{kind}"] = tensor.clone()
        elif name == "image_newline" and newline:
            tensors[f"{prefix}image_newline"] = tensor.clone()
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "prefix", "newline", "initialised"),
    [
        ("mm_projector.bin", "model.", False, "image_newline"),
        ("mm_projector.safetensors", "base_model.model.model.", True, ""),
    ],
)
def test_a_published_projector_joins_tower_and_decoder(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    prefix: str,
    newline: bool,
    initialised: str,
) -> None:
    _llava_file(models["first"], tmp_path / name, prefix, newline)
    parts = ["--vision-model", str(models["clip"]), "--language-model", str(models["olmo"])]
    save = ["--projector", str(tmp_path / name), "--save", str(tmp_path / "megatron")]
    assert hf_to_megatron.main([*parts, *save]) == 0
    output = capsys.readouterr().out
    assert output.count("randomly initialised") == bool(initialised)
    assert f"to be trained: {initialised}\n" in output or not initialised
    exported, wanted = _tensors(tmp_path / "megatron"), _original(models["first"])
    for key in (key for key in exported if key.startswith((PROJECTOR, "image_newline"))):
        assert torch.equal(exported[key], wanted[key]) == (key != initialised), key


def test_round_trip_of_a_projector_alone(models: dict[str, Path], tmp_path: Path) -> None:
    """LLaVA's own code loads the exported file, and the next stage starts from it."""
    export = ["--load", str(models["megatron"]), "--save", str(tmp_path / "projector"), "--format", "projector"]
    assert megatron_to_hf.main(export) == 0
    file = tmp_path / "projector" / "mm_projector.bin"
    assert file.stat().st_size < 40_000, "the projector alone"
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    # LLaVA: {name.split("mm_projector.")[1]: weight ... if "mm_projector" in name} into its nn.Sequential
    width, hidden = VISION_SIZES["hidden_size"], LANGUAGE_SIZES["hidden_size"]
    theirs = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
    theirs.load_state_dict({k.split("mm_projector.")[1]: v for k, v in saved.items() if "mm_projector" in k})
    assert sorted(k for k in saved if "mm_projector" not in k) == ["model.image_newline"]

    arguments = ["--vision", models["first"], "--projector", tmp_path / "projector", "--language", models["first"]]
    assert merge.main([*map(str, arguments), "--save", str(tmp_path / "merged")]) == 0
    exported, wanted = _tensors(tmp_path / "merged"), _original(models["second"])
    others = _original(models["first"])
    for name, tensor in exported.items():
        of_projector = name.startswith((PROJECTOR, "image_newline"))
        assert torch.equal(tensor, (wanted if of_projector else others)[name]), name


def test_parts_that_do_not_fit(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide"
    llava_next_model(language=GROUPED_QUERY_SIZES).save_pretrained(wide)
    write_tokenizer(wide)
    (tmp_path / "text.bin").write_bytes(b"not a pickle at all")
    torch.save({"model.mm_projector.0.bias": torch.ones(40)}, tmp_path / "half.bin")
    torch.save({"optimizer": [1, 2]}, tmp_path / "state.bin")
    siglip = tmp_path / "siglip"
    write_llava_next(siglip, vision=SIGLIP_SIZES | {"model_type": "siglip_vision_model"})
    cases = [
        (models["clip"], wide, models["olmo"], f"the projector of {wide} does not fit: its first weight is (48, 48)"),
        (siglip, models["first"], models["olmo"], "the tower's hidden size is 36 and the language model's 40"),
        (models["olmo"], models["first"], models["olmo"], "olmo (olmo) has no vision tower"),
        (models["clip"], models["first"], models["clip"], "clip (clip_vision_model) has no language model"),
        (models["clip"], models["olmo"], models["olmo"], "olmo (olmo) has no projector"),
        (models["clip"], tmp_path / "text.bin", models["olmo"], "text.bin is not a file of weights"),
        (models["clip"], tmp_path / "half.bin", models["olmo"], "half.bin holds no projector"),
        (models["clip"], tmp_path / "state.bin", models["olmo"], "does not hold named tensors only"),
        (models["clip"], tmp_path / "nothing", models["olmo"], "nothing is not a model: it has neither config.json"),
    ]
    for vision, projector, language, message in cases:
        arguments = ["--vision", vision, "--projector", projector, "--language", language]
        assert merge.main([*map(str, arguments), "--save", str(tmp_path / "merged")]) == 1
        reported = capsys.readouterr().err
        assert message in reported
        assert reported.count("error: ") == 1
        assert not (tmp_path / "merged").exists()


def test_a_projector_for_a_whole_model_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        hf_to_megatron.main(["--model", "a", "--projector", "b", "--save", "c"])
    assert stopped.value.code == 2
    assert "use checkpoint_convert.merge" in capsys.readouterr().err
