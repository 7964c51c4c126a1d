"""Engines for Hugging Face folders of each format give the answers of the converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint_convert import hf_to_megatron
from checkpoint_convert.engine import open_engine
from checkpoint_convert.errors import ConversionError
from tests.inference.run_folder import NEW_TOKENS
from tests.inference.run_ranks import CONFIG
from tests.inference.tiny_model import SIZES, random_specs
from tests.instellavl.exports import write_exports
from tests.support.launch import ROOT, launch
from tests.support.random_models import clip_vision_model, write_llava_next

RUN_FOLDER = ROOT / "tests" / "inference" / "run_folder.py"


def _answers(folder: Path) -> list[list[int]]:
    with open_engine(folder, CONFIG) as engine:
        assert engine is not None
        return engine.generate([spec.prompt() for spec in random_specs(5, 40)], NEW_TOKENS)


def test_folders_and_the_checkpoint_answer_alike(tmp_path: Path) -> None:
    write_exports(tmp_path)
    folders = [tmp_path / name for name in ("llava_next", "instellavl", "checkpoint")]
    assert hf_to_megatron.main(["--model", str(folders[0]), "--save", str(folders[2])]) == 0
    llava_next, instellavl, checkpoint = map(_answers, folders)
    assert llava_next == instellavl == checkpoint
    assert len(set(map(tuple, checkpoint))) == len(checkpoint), "all answers are the same"


def test_a_folder_in_four_processes(tmp_path: Path) -> None:
    """The layers are distributed over two stages, and every tensor is sliced for two ranks."""
    write_llava_next(tmp_path / "folder", language=SIZES)
    launch(RUN_FOLDER, tmp_path / "folder", tmp_path / "out.json", ranks=4, timeout=120)
    assert json.loads((tmp_path / "out.json").read_text()) == _answers(tmp_path / "folder")


def test_a_part_of_a_model_has_no_answers(tmp_path: Path) -> None:
    clip_vision_model().save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="has only vision: answers need a whole model"), open_engine(tmp_path):
        pass
