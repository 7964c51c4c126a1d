"""The files of a checkpoint beside its tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_vlm.training.checkpoint.destination import LocalDestination
from tests.data.helpers import tiny_tokenizer_folder


def test_an_interrupted_copy_of_the_tokenizer_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, source = tmp_path / "save", tiny_tokenizer_folder(tmp_path / "source")

    def copy_one_file(_: Path, folder: Path, **__: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(source.iterdir()), folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", copy_one_file)
        LocalDestination(save).keep_tokenizer(source, "auto")
    LocalDestination(save).keep_tokenizer(source, "auto")
    names = sorted(["chat_template.jinja", *(path.name for path in source.iterdir())])
    assert len(names) > 2 and sorted(path.name for path in (save / "tokenizer").iterdir()) == names
