"""Puts the demo's scripts, which are not a package, on the import path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "instellavl"
sys.path.append(str(EXAMPLES / "demo"))

import balanced  # noqa: E402
import easy_vqa  # noqa: E402
import tokenizer as demo_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel with the published data set, cached between test runs."""
    return easy_vqa.fetch_wheel()


@pytest.fixture(scope="session")
def training(wheel: Path) -> list[easy_vqa.Question]:
    return easy_vqa.read_questions(wheel, "train")


@pytest.fixture(scope="session")
def trained_tokenizer(training: list[easy_vqa.Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer folder of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    annotations = {
        "captions": easy_vqa.caption_annotations(training),
        "questions": easy_vqa.question_annotations(training),
    }
    for name, entries in annotations.items():
        (folder / f"{name}.json").write_text(json.dumps(entries))
    files = [folder / f"{name}.json" for name in annotations]
    files += [folder / name for name in balanced.write(folder, training)]
    demo_tokenizer.save(demo_tokenizer.train(demo_tokenizer.texts(files)), folder / "tokenizer")
    return folder / "tokenizer"
