"""Functions of the task `easy_vqa`; lmms-eval reads their names from easy_vqa.yaml.

A document is an entry of the demo's test.json. Answers count as in the demo's evaluate.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

Document = Mapping[str, Any]


def _load_evaluate() -> ModuleType:
    """The demo's evaluate.py. lmms-eval itself imports another module of this name, so it is loaded by its path."""
    file = Path(__file__).parents[1] / "evaluate.py"
    spec = importlib.util.spec_from_file_location("demo_evaluate", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_evaluate = _load_evaluate()


def images(document: Document, settings: Mapping[str, str]) -> list[Image.Image]:
    """The image of a document; `settings` are lmms_eval_specific_kwargs."""
    return [Image.open(Path(settings["image_folder"], document["image"])).convert("RGB")]


def question(document: Document, _: Mapping[str, str]) -> str:
    text: str = document["conversations"][0]["value"]
    return text.removeprefix("<image>\n")


def truth(document: Document) -> str:
    answer: str = document["conversations"][1]["value"]
    return answer


def results(document: Document, answers: Sequence[str]) -> dict[str, Any]:
    """The score of an answer under its question's type, and what `accuracy` needs of it."""
    right = truth(document)
    answer = answers[0].strip()
    score = float(answer == right)
    sample = {"text": question(document, {}), "truth": right, "image": document["image"], "answer": answer}
    return {"accuracy": {**sample, "score": score}, _evaluate.question_type(right): score}


def accuracy(samples: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers. Prints how often each answer was given to the questions with each true answer."""
    questions = [_evaluate.Question(sample["text"], sample["truth"], sample["image"]) for sample in samples]
    print("\n".join(_evaluate.confusion(questions, [sample["answer"] for sample in samples])))
    return sum(sample["score"] for sample in samples) / len(samples)
