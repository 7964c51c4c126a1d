"""Both published snippets run on an export, and give stock transformers' answers."""

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
    """What answer.py says under the Python that runs the tests."""
    launch(ANSWER, folder, ranks=1, timeout=280)
    return read_answers(folder)


def ask_in(environment: Environment, folder: Path) -> Any:
    """What answer.py says where only the environment's packages are found, ours among them."""
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
    """That every snippet says what stock transformers says, to the end, and a batch what its prompts say alone."""
    for snippet, stock in answers["stock"].items():
        assert answers[snippet].keys() == stock.keys()
        for name, answer in answers[snippet].items():
            assert stock[name].endswith(EOS), f"{name}: the reference never ends: {stock[name]!r}"
            assert answer.removesuffix(EOS).strip() == stock[name].removesuffix(EOS).strip(), (snippet, name)
    assert answers["batch"] == answers["hugging_face"]


def compare_varied(answers: Any) -> None:
    """The same, where answers depend on the image and have several lines."""
    compare(answers)
    single = answers["hugging_face"].values()
    assert any("\n" in answer for answer in single), "a newline did not come up"
    assert len(set(single)) > 3, "the answers do not depend on the image"


def test_snippets_say_what_stock_transformers_says(tmp_path: Path) -> None:
    compare_varied(ask(exports(tmp_path)))


@pytest.mark.full
def test_under_transformers_4_and_5(tmp_path: Path, inference: Environment, older: Environment) -> None:
    """Each in an environment of its own, which holds what the extra `inference` installs and no more."""
    folder = exports(tmp_path)
    said = [ask_in(environment, folder) for environment in (inference, older)]
    assert [answers.pop("transformers") for answers in said] == ["5.23.0", "4.57.6"]
    compare_varied(said[0])
    assert said[0] == said[1]
