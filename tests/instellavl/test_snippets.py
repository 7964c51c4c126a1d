"""Both published snippets run on an export, and give stock transformers' answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.instellavl.exports import pictures, write_exports
from tests.launch import ROOT

EOS = "|||IP_ADDRESS|||"
OLDER = ("transformers==4.57.6", "tokenizers>=0.22,<0.23.1", "huggingface_hub<1")


def ask(folder: Path, python: Path | str) -> Any:
    """What answer.py says under this Python, offline and with a cache of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    command = [str(python), "tests/instellavl/answer.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=280, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return json.loads((folder / "answers.json").read_text())


def exports(folder: Path) -> Path:
    write_exports(folder)
    (folder / "images").mkdir()
    for name, image in pictures().items():
        image.save(folder / "images" / f"{name}.png")
    return folder


def compare(answers: Any) -> None:
    """That every snippet says what stock transformers says, to the end and over several lines."""
    for snippet, stock in answers["stock"].items():
        for name, answer in answers[snippet].items():
            assert stock[name].endswith(EOS), f"{name}: the reference never ends: {stock[name]!r}"
            assert answer.removesuffix(EOS).strip() == stock[name].removesuffix(EOS).strip(), (snippet, name)
    single = answers["hugging_face"]
    assert answers["batch"] == single
    assert any("\n" in answer for answer in single.values()), "a newline did not come up"
    assert len(set(single.values())) > 3, "the answers do not depend on the image"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ask(exports(tmp_path_factory.mktemp("exports")), sys.executable)


def test_snippets_say_what_stock_transformers_says(answers: Any) -> None:
    compare(answers)


@pytest.mark.full
def test_under_transformers_4(tmp_path: Path) -> None:
    """In a virtual environment of its own, which takes torch from the one the tests run in."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--ignore-installed", *OLDER], check=True, timeout=600)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    (Path(own.stdout.strip()) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    answers = ask(exports(tmp_path), python)
    assert answers["transformers"] == "4.57.6"
    compare(answers)
