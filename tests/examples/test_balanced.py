"""Balanced questions: right answers, as many yes as no, in the words of easy-VQA's training questions."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import balanced
import easy_vqa
import pytest
from easy_vqa import COLOURS, NAMED, NEGATION, SHAPES, Question


def turns(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer), without what the first question begins with."""
    texts = [message["value"] for message in entry["conversations"]]
    texts[0] = texts[0].partition("\n")[2]
    return list(zip(texts[::2], texts[1::2], strict=True))


def truth(question: str, colour: str, shape: str) -> str:
    """The answer, from the words of the question."""
    named = NAMED.search(question)
    if not question.startswith(("is ", "does ")):
        return colour if "colo" in question else shape
    assert named
    return "yes" if (named.group() in (colour, shape)) != bool(NEGATION.search(question)) else "no"


def test_wordings_are_those_of_the_training_questions(training: list[Question]) -> None:
    asked = {NAMED.sub("{}", question.text) for question in training}
    kinds = balanced.wordings(training)
    used = [text for kind in kinds for text in (*kind.open, *kind.plain, *kind.negated)]
    assert Counter(used) == Counter(asked | {easy_vqa.COLOUR_REQUEST, easy_vqa.SHAPE_REQUEST})
    assert [(len(kind.open), len(kind.plain), len(kind.negated)) for kind in kinds] == [(5, 4, 4), (5, 4, 4)]


def _sampling(share: float, count: int) -> float:
    """2.5 standard deviations of a share among so many random questions. They come from a fixed seed."""
    return 2.5 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("share", [0.0, 1 / 3])
def test_descriptions_are_answered_right_and_half_of_the_time_yes(training: list[Question], share: float) -> None:
    entries = balanced.description_annotations(training, "words", 2000, share)
    answers: Counter[tuple[bool, bool, str]] = Counter()
    for entry in entries:
        assert "image" not in entry
        described = entry["conversations"][0]["value"].partition("\n")[0].split()
        (colour,), (shape,) = (set(described) & set(words) for words in (COLOURS, SHAPES))
        assert set(described) <= {colour, shape, balanced.FILLER}
        about = [text for text, _ in turns(entry)]
        assert len(about) == 2
        for question, answer in turns(entry):
            assert answer == truth(question, colour, shape), question
            named = NAMED.search(question)
            if answer in ("yes", "no"):
                assert named
                answers[named.group() in COLOURS, bool(NEGATION.search(question)), answer] += 1
    negated = sum(count for (_, is_negated, _), count in answers.items() if is_negated)
    assert negated / answers.total() == pytest.approx(share, abs=_sampling(share, answers.total()))
    for colour_named in (True, False):
        for is_negated in (True, False) if share else (False,):
            yes, no = (answers[colour_named, is_negated, answer] for answer in ("yes", "no"))
            assert yes / (yes + no) == pytest.approx(0.5, abs=_sampling(0.5, yes + no))


def test_questions_on_images_agree_with_the_published_answers(training: list[Question]) -> None:
    published = {
        (easy_vqa.image_name("train", image, copy), text): answer
        for text, answer, image in training
        for copy in range(easy_vqa.COPIES)
    }
    entries = balanced.image_annotations(training)
    facts = easy_vqa.facts_from_answers(training)
    known = sum(bool(fact.colour and fact.shape) for fact in facts.values())
    assert len(entries) == easy_vqa.COPIES * known
    compared = 0
    for entry in entries:
        for question, answer in turns(entry):
            expected = published.get((entry["image"], question))
            compared += expected is not None
            assert expected in (None, answer), (entry["id"], question)
    assert compared > 500


def test_written_files_are_the_same_on_every_machine(
    training: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balanced, "DESCRIPTIONS", {"words": (50, 0.0), "negations": (60, 0.5)})
    written = []
    for name in ("a", "b"):
        random.seed(name)
        (tmp_path / name).mkdir()
        counts = balanced.write(tmp_path / name, training)
        assert counts == {"words.json": 50, "negations.json": 60, "balanced.json": 7084}
        written.append({file: (tmp_path / name / file).read_bytes() for file in counts})
    assert written[0] == written[1]
