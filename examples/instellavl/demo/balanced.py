"""Questions in easy-VQA's words of which half are answered yes, on descriptions of an image in words, and on images.

    teal . . circle .
    is there a teal shape? -> yes

The language model learns from the descriptions what the questions mean. OLMo-1B comes to stage 1 with what it has
learned from text; the demo's language model starts from random weights. The same questions take a quarter of the tokens
that they take with images. Stage 2 has the questions on images.

Of easy-VQA's own yes/no questions about a colour, seven of eight have the same answer, so that their wording is nearly
all there is to learn at first. And half of them have a negation, which turns the answer round: a model that compares
question and image, and does not yet understand negations, is right in half of the cases, like one that does not
compare. It learns neither. So the first descriptions have no negations, and the others fewer than half
(docs/decisions.md has the figures).

python examples/instellavl/demo/balanced.py --output runs/demo/data
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easy_vqa import (
    COLOUR_REQUEST,
    COLOURS,
    COPIES,
    NAMED,
    NEGATION,
    SHAPE_REQUEST,
    SHAPES,
    Question,
    annotation,
    facts_from_answers,
    fetch_wheel,
    image_name,
    question_type,
    read_questions,
)

NEGATED_SHARE = 1 / 3
"""Share of the yes/no questions that have a negation, where some have one."""
DESCRIPTIONS = {"words": (13000, 0.0), "negations": (23000, NEGATED_SHARE)}
"""File -> descriptions in it, and their share of negations."""
FILLER, MAX_FILLERS = ".", 8
OPEN_SHARE = 0.25
"""Share of the questions that are not answered yes or no."""


@dataclass
class Wordings:
    """How questions about one kind of word, colours or shapes, are asked; `{}` stands for a word."""

    words: tuple[str, ...]
    open: list[str]
    """Asks for the word, and may name the other kind's: "what is the {} shape?"."""
    plain: list[str]
    """Asks whether it is this word."""
    negated: list[str]
    """Asks whether it is not this word."""


def wordings(questions: list[Question]) -> tuple[Wordings, Wordings]:
    """Those about colours and those about shapes."""
    colour, shape = Wordings(COLOURS, [COLOUR_REQUEST], [], []), Wordings(SHAPES, [SHAPE_REQUEST], [], [])
    asked = set()
    for question in questions:
        named, kind = NAMED.search(question.text), question_type(question.answer)
        is_open = kind != "yes/no"
        about_shape = kind == "shape" if is_open else bool(named and named.group() in SHAPES)
        asked.add((NAMED.sub("{}", question.text), is_open, about_shape))
    for text, is_open, about_shape in sorted(asked):
        kind_of_word = shape if about_shape else colour
        group = kind_of_word.negated if NEGATION.search(text) else kind_of_word.plain
        (kind_of_word.open if is_open else group).append(text)
    return colour, shape


def ask(rng: random.Random, kind: Wordings, word: str, other: str, negated_share: float) -> tuple[str, str]:
    """(question, answer) about a description with `word` and the other kind's word."""
    if rng.random() < OPEN_SHARE:
        return rng.choice(kind.open).format(other), word
    negated, same = rng.random() < negated_share, rng.random() < 0.5
    named = word if same else rng.choice([another for another in kind.words if another != word])
    question = rng.choice(kind.negated if negated else kind.plain).format(named)
    return question, "yes" if same != negated else "no"


def describe(rng: random.Random, words: list[str]) -> str:
    """The words in any order, with fillers anywhere, because most tokens of an image do not show its shape."""
    tokens = [FILLER] * rng.randint(0, MAX_FILLERS)
    for word in rng.sample(words, len(words)):
        tokens.insert(rng.randint(0, len(tokens)), word)
    return " ".join(tokens)


def two_questions(
    rng: random.Random, kinds: tuple[Wordings, Wordings], colour: str, shape: str, negated_share: float
) -> list[tuple[str, str]]:
    """(question, answer) turns: one about the colour and one about the shape, in either order."""
    of_colour, of_shape = kinds
    turns = [ask(rng, of_colour, colour, shape, negated_share), ask(rng, of_shape, shape, colour, negated_share)]
    rng.shuffle(turns)
    return turns


def description_annotations(
    questions: list[Question], name: str, count: int, negated_share: float, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` descriptions, each with two questions."""
    rng, kinds = random.Random(seed), wordings(questions)
    entries = []
    for number in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        turns = two_questions(rng, kinds, colour, shape, negated_share)
        entries.append(annotation(f"{name}-{number}", None, turns, describe(rng, [colour, shape])))
    return entries


def image_annotations(questions: list[Question], seed: int = 0) -> list[dict[str, Any]]:
    """Two questions on each copy of a training image whose colour and shape are known."""
    rng, kinds = random.Random(seed), wordings(questions)
    return [
        annotation(
            f"balanced-{image}-{copy}",
            image_name("train", image, copy),
            two_questions(rng, kinds, facts.colour, facts.shape, NEGATED_SHARE),
        )
        for image, facts in sorted(facts_from_answers(questions).items())
        if facts.colour and facts.shape
        for copy in range(COPIES)
    ]


def write(output: Path, questions: list[Question]) -> dict[str, int]:
    """Write the files; returns the entries of each."""
    files = {
        name: description_annotations(questions, name, count, negated_share)
        for name, (count, negated_share) in DESCRIPTIONS.items()
    }
    files["balanced"] = image_annotations(questions)
    for name, entries in files.items():
        (output / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return {f"{name}.json": len(entries) for name, entries in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output folder")
    options = parser.parse_args()
    try:
        counts = write(options.output, read_questions(fetch_wheel(), "train"))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{count} entries in {name}" for name, count in counts.items()), "->", options.output)


if __name__ == "__main__":
    main()
