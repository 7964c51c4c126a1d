"""easy-VQA as annotations: facts derived from answers, and no test data in training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
from easy_vqa import Facts, Question


def all_turns(entries: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
    """Counts of (image, question, answer)."""
    return Counter(
        (entry["image"], turns[i]["value"].removeprefix("<image>\n"), turns[i + 1]["value"])
        for entry in entries
        for turns in [entry["conversations"]]
        for i in range(0, len(turns), 2)
    )


@pytest.mark.parametrize(("answer", "kind"), [("teal", "colour"), ("rectangle", "shape"), ("no", "yes/no")])
def test_question_type(answer: str, kind: str) -> None:
    assert easy_vqa.question_type(answer) == kind


@pytest.mark.parametrize(
    ("text", "answer", "facts"),
    [
        ("what color is the shape?", "red", Facts(colour="red")),
        ("what is the blue shape?", "circle", Facts("blue", "circle")),
        ("what color is the triangle?", "teal", Facts("teal", "triangle")),
        ("is there a gray shape?", "yes", Facts(colour="gray")),
        ("is there a gray shape?", "no", None),
        ("is there not a circle in the image?", "no", Facts(shape="circle")),
        ("is no circle present?", "yes", None),
    ],
)
def test_facts_from_one_answer(text: str, answer: str, facts: Facts | None) -> None:
    assert easy_vqa.facts_from_answers([Question(text, answer, 7)]) == ({7: facts} if facts else {})


@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_agree_with_all_published_answers(wheel: Path, split: str) -> None:
    questions = easy_vqa.read_questions(wheel, split)
    facts = easy_vqa.facts_from_answers(questions)
    for text, answer, image in questions:
        if answer not in ("yes", "no") and image in facts:
            assert answer in (facts[image].colour, facts[image].shape), (text, image)
        named = easy_vqa.NAMED.search(text)
        if answer in ("yes", "no") and named:
            known = facts.get(image, Facts())
            seen = known.colour if named.group() in easy_vqa.COLOURS else known.shape
            present = (answer == "yes") != bool(easy_vqa.NEGATION.search(text))
            assert (seen == named.group()) == present, (text, image)


def test_captions_contain_the_known_facts() -> None:
    assert [answer for _, answer in easy_vqa.caption(Facts("red", "circle"))] == ["circle", "red"]
    assert [answer for _, answer in easy_vqa.caption(Facts(colour="red"))] == ["red"]
    assert easy_vqa.caption(Facts()) == []


def test_each_training_question_occurs_once_in_short_conversations(training: list[Question]) -> None:
    entries = easy_vqa.question_annotations(training)
    asked = Counter((easy_vqa.image_name("train", image), text, answer) for text, answer, image in training)
    assert all_turns(entries) == asked
    assert len({entry["id"] for entry in entries}) == len(entries)
    lengths = Counter(len(entry["conversations"]) // 2 for entry in entries)
    assert set(lengths) == set(range(1, easy_vqa.MAX_TURNS + 1))
    assert easy_vqa.question_annotations(training) == entries  # the same on every machine


def test_training_data_contains_no_test_data(wheel: Path, tmp_path: Path) -> None:
    counts = easy_vqa.write(tmp_path, wheel)
    assert counts["test.json"] == 9673
    captions, questions, test = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "questions", "test")
    )
    assert {entry["image"].split("/")[0] for entry in captions + questions} == {"train"}
    assert {entry["image"].split("/")[0] for entry in test} == {"test"}
    assert all((tmp_path / "images" / entry["image"]).is_file() for entry in captions + questions + test)
    assert len(list((tmp_path / "images" / "train").iterdir())) == 4000
    test_bytes = {path.read_bytes() for path in (tmp_path / "images" / "test").iterdir()}
    train_bytes = {path.read_bytes() for path in (tmp_path / "images" / "train").iterdir()}
    assert not test_bytes & train_bytes
    published = easy_vqa.read_questions(wheel, "test")
    assert all_turns(test) == Counter(
        (easy_vqa.image_name("test", image), text, answer) for text, answer, image in published
    )


def test_a_wheel_with_a_wrong_checksum_is_rejected(tmp_path: Path) -> None:
    (tmp_path / easy_vqa.WHEEL).write_bytes(b"another")
    with pytest.raises(RuntimeError, match="is not the published easy-vqa==1.0. Delete the file"):
        easy_vqa.fetch_wheel(tmp_path)
