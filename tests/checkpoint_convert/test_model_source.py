"""Every source of weights is opened by one function, with the settings and the tokenizer that belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron
from checkpoint_convert.model_source import open_source
from megatron_vlm.training.checkpoint import read_recipe
from tests.instellavl.exports import write_exports
from tests.support.random_models import olmo_model


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`instellavl`, whose config has no image_token_index, as the published one; `llava_next`; and `olmo`."""
    root = tmp_path_factory.mktemp("exports")
    write_exports(root)
    file = root / "instellavl" / "config.json"
    config = json.loads(file.read_text())
    del config["image_token_index"]
    file.write_text(json.dumps(config))
    olmo_model().save_pretrained(root / "olmo")
    write_tokenizer(root / "longer", 276)
    return root


def test_image_token_is_the_next_id_of_the_tokenizer(exports: Path, tmp_path: Path) -> None:
    model = open_source(exports / "instellavl").model
    assert model is not None and model.image_token_index == 270
    arguments = ["--model", str(exports / "instellavl"), "--tokenizer", str(exports / "longer")]
    assert hf_to_megatron.main([*arguments, "--save", str(tmp_path / "megatron")]) == 0
    assert read_recipe(tmp_path / "megatron").model.image_token_index == 276


def test_both_formats_of_a_model_have_the_same_names_and_parts(exports: Path) -> None:
    instellavl, llava_next = open_source(exports / "instellavl"), open_source(exports / "llava_next")
    assert sorted(instellavl.tensors) == sorted(llava_next.tensors)
    assert instellavl.parts == llava_next.parts == ["vision", "projector", "language"]
    assert open_source(exports / "olmo").parts == ["language"]


def test_a_part_alone_is_not_a_whole_model(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_to_megatron.main(["--model", str(exports / "olmo"), "--save", str(tmp_path / "megatron")]) == 1
    assert "olmo (olmo) is not a Hugging Face folder of a whole VLM" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
