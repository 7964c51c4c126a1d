"""easy-VQA as annotations: facts derived from answers, and no test data in training."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
from augmentation import move_shape
from easy_vqa import Facts, Question
from PIL import Image, ImageDraw, ImageOps


def all_turns(entries: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
    """Counts of (image, question, answer)."""
    return Counter(
        (entry["image"], turns[i]["value"].removeprefix("<image>\n"), turns[i + 1]["value"])
        for entry in entries
        for turns in [entry["conversations"]]
        for i in range(0, len(turns), 2)
    )


@pytest.fixture(scope="module")
def data(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the first step."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    assert easy_vqa.write(folder, wheel)["test.json"] == 9673
    return folder


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
    turns = all_turns(entries)
    assert sum(turns.values()) == len(training)
    found: Counter[tuple[str, str, str]] = Counter()
    for (image, text, answer), count in turns.items():
        found[re.sub(r"-\d+\.png", ".png", image), text, answer] += count
    assert found == asked
    assert len({image for image, _, _ in turns}) > 1.8 * len({image for image, _, _ in asked})  # copies, too
    assert len({entry["id"] for entry in entries}) == len(entries)
    lengths = Counter(len(entry["conversations"]) // 2 for entry in entries)
    assert set(lengths) == set(range(1, easy_vqa.MAX_TURNS + 1))
    assert easy_vqa.question_annotations(training) == entries  # the same on every machine


def test_a_moved_shape_is_the_same_or_mirrored_and_inside() -> None:
    image = Image.new("RGB", (64, 64), (230, 240, 250))
    ImageDraw.Draw(image).polygon([(0, 20), (12, 20), (0, 31)], fill=(0, 128, 128))  # in a corner of its own box
    shape, rng, positions = image.crop((0, 20, 13, 32)), random.Random(0), set()
    kinds = Counter[bool]()
    for _ in range(50):
        moved = move_shape(image, rng)
        changed = [at for at in range(64 * 64) if moved.getpixel((at % 64, at // 64)) != (230, 240, 250)]
        left, top = min(at % 64 for at in changed), min(at // 64 for at in changed)
        found = moved.crop((left, top, left + 13, top + 12)).tobytes()
        assert found in (shape.tobytes(), ImageOps.mirror(shape).tobytes())
        kinds[found == shape.tobytes()] += 1
        positions.add((left, top))
    assert len(positions) > 40 and min(kinds.values()) > 10


def test_every_copy_of_a_published_image_has_its_colours(data: Path) -> None:
    for number in range(0, 4000, 400):
        images = [
            Image.open(data / "images" / easy_vqa.image_name("train", number, copy)).convert("RGB")
            for copy in range(easy_vqa.COPIES)
        ]
        counts = [sorted(image.getcolors(4096) or []) for image in images]
        assert all(count == counts[0] for count in counts), number
        assert len({image.tobytes() for image in images}) == easy_vqa.COPIES


def test_training_data_contains_no_test_data(wheel: Path, data: Path) -> None:
    captions, questions, test = (
        json.loads((data / f"{name}.json").read_text()) for name in ("captions", "questions", "test")
    )
    assert {entry["image"].split("/")[0] for entry in captions + questions} == {"train"}
    assert {entry["image"].split("/")[0] for entry in test} == {"test"}
    assert all((data / "images" / entry["image"]).is_file() for entry in captions + questions + test)
    assert len(list((data / "images" / "train").iterdir())) == 4000 * easy_vqa.COPIES
    test_bytes = {path.read_bytes() for path in (data / "images" / "test").iterdir()}
    train_bytes = {path.read_bytes() for path in (data / "images" / "train").iterdir()}
    assert not test_bytes & train_bytes
    published = easy_vqa.read_questions(wheel, "test")
    assert all_turns(test) == Counter(
        (easy_vqa.image_name("test", image), text, answer) for text, answer, image in published
    )


def test_a_wheel_with_a_wrong_checksum_is_rejected(tmp_path: Path) -> None:
    (tmp_path / easy_vqa.WHEEL).write_bytes(b"another")
    with pytest.raises(RuntimeError, match="is not the published easy-vqa==1.0. Delete the file"):
        easy_vqa.fetch_wheel(tmp_path)
