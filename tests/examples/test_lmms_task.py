"""The demo's test questions as a task of lmms-eval: its functions, called as lmms-eval calls them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import easy_vqa
import evaluate
import pytest
import yaml
from PIL import Image

from tests.checkpoint_convert.whole_model import picture
from tests.examples.conftest import EXAMPLES

TASK = EXAMPLES / "demo" / "lmms_eval" / "easy_vqa.yaml"
QUESTIONS = [
    easy_vqa.Question("what color is the shape?", "red", 0),
    easy_vqa.Question("is there a circle?", "no", 1),
    easy_vqa.Question("what is it?", "circle", 1),
]


@pytest.fixture
def task() -> dict[str, Any]:
    """The task, with the functions that its tags `!function` name."""
    spec = importlib.util.spec_from_file_location("task_functions", TASK.with_name("utils.py"))
    assert spec is not None and spec.loader is not None
    functions: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(functions, str(node.value).removeprefix("utils.")))
    loaded: dict[str, Any] = yaml.load(TASK.read_text(), Loader)
    return loaded


def test_questions_are_those_of_the_demos_evaluation(task: dict[str, Any], tmp_path: Path) -> None:
    entries = easy_vqa.test_annotations(QUESTIONS)
    (tmp_path / "test.json").write_text(json.dumps(entries))
    (tmp_path / "test").mkdir()
    for number in range(2):
        picture((20, 20), seed=number).save(tmp_path / easy_vqa.image_name("test", number))
    settings = task["lmms_eval_specific_kwargs"]["default"] | {"image_folder": str(tmp_path)}
    asked = evaluate.read_questions(tmp_path / "test.json")
    for entry, question in zip(entries, asked, strict=True):
        assert (task["doc_to_text"](entry, settings), task["doc_to_target"](entry)) == question[:2]
        (image,) = task["doc_to_visual"](entry, settings)
        assert image.tobytes() == Image.open(tmp_path / question.image).convert("RGB").tobytes()
    assert task["generation_kwargs"]["max_new_tokens"] == evaluate.MAX_NEW_TOKENS


def test_paths_are_those_of_the_demo(task: dict[str, Any]) -> None:
    """The first step of `make demo` writes them."""
    assert task["dataset_kwargs"]["data_files"]["test"] == "runs/demo/data/test.json"
    assert task["lmms_eval_specific_kwargs"]["default"]["image_folder"] == "runs/demo/data/images"


def test_scores_and_the_confusion_sheet(task: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    entries = easy_vqa.test_annotations(QUESTIONS)
    answers = ["red", "no", "triangle"]
    scores = [task["process_results"](entry, [f" {answer}\n"]) for entry, answer in zip(entries, answers, strict=True)]
    assert [(score["colour"],) if "colour" in score else None for score in scores] == [(1.0,), None, None]
    assert (scores[1]["yes/no"], scores[2]["shape"]) == (1.0, 0.0)
    metrics = {metric["metric"]: metric["aggregation"] for metric in task["metric_list"]}
    assert set(metrics) == {name for score in scores for name in score}
    assert metrics["accuracy"]([score["accuracy"] for score in scores]) == 2 / 3
    asked = [evaluate.Question(text, truth, str(image)) for text, truth, image in QUESTIONS]
    assert capsys.readouterr().out == "\n".join(evaluate.confusion(asked, answers)) + "\n"
