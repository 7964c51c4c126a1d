"""Both published snippets run on an export, and give the answers of stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.instellavl.exports import pictures, write_exports
from tests.support.environments import Environment
from tests.support.launch import ROOT, launch

ANSWER = ROOT / "tests" / "instellavl" / "answer.py"
EOS = "|||IP_ADDRESS|||"


def read_answers(folder: Path) -> Any:
    return json.loads((folder / "answers.json").read_text())


def ask(folder: Path) -> Any:
    """The answers of answer.py in this environment."""
    launch(ANSWER, folder, ranks=1, timeout=280)
    return read_answers(folder)


def ask_in(environment: Environment, folder: Path) -> Any:
    """The answers of answer.py in another environment, with this project installed."""
    done = environment.run(ANSWER, folder)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return read_answers(folder)


def exports(folder: Path) -> Path:
    write_exports(folder)
    (folder / "images").mkdir()
    for name, image in pictures().items():
        image.save(folder / "images" / f"{name}.png")
    return folder


def compare(answers: Any) -> None:
    """Assert that every snippet gives stock transformers' complete answers, and a batch those of single prompts."""
    for snippet, stock in answers["stock"].items():
        assert answers[snippet].keys() == stock.keys()
        for name, answer in answers[snippet].items():
            assert stock[name].endswith(EOS), f"{name}: the reference never ends: {stock[name]!r}"
            assert answer.removesuffix(EOS).strip() == stock[name].removesuffix(EOS).strip(), (snippet, name)
    assert answers["batch"] == answers["hugging_face"]


def compare_varied(answers: Any) -> None:
    """The same, and that answers depend on the image and have several lines."""
    compare(answers)
    single = answers["hugging_face"].values()
    assert any("\n" in answer for answer in single), "no answer has a newline"
    assert len(set(single)) > 3, "the answers do not depend on the image"


def test_snippets_give_the_answers_of_stock_transformers(tmp_path: Path) -> None:
    compare_varied(ask(exports(tmp_path)))


@pytest.mark.full
def test_under_transformers_4_and_5(tmp_path: Path, inference: Environment, older: Environment) -> None:
    """Each in a separate environment with only the packages of the extra `inference`."""
    folder = exports(tmp_path)
    said = [ask_in(environment, folder) for environment in (inference, older)]
    assert [answers.pop("transformers") for answers in said] == ["5.23.0", "4.57.6"]
    compare_varied(said[0])
    assert said[0] == said[1]
