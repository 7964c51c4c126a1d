"""Converters of other datasets to LLaVA annotations, and how to add one.

A converter is a class with a name, its own flags, and a method that converts a row of the dataset to an annotation
entry:

    @register
    class Riddles(Converter):
        \"\"\"riddle, solution -> one question and its answer\"\"\"

        name = "riddles"

        def entry(self, row, images):
            return conversation(row["riddle"], row["solution"])

Use it with `megatron-vlm convert-dataset riddles --plugin riddles.py ...`.
"""

from __future__ import annotations

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.cells import answer_cell, cell, is_missing, list_cell, parse_list, text_cell
from megatron_vlm.data.prepare.image_store import ImageStore
from megatron_vlm.data.prepare.prompts import PROMPTS
from megatron_vlm.data.prepare.reading_order import parse_box, reading_order
from megatron_vlm.data.prepare.tables import RowError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.sources.annotations import image_like_key, parse_annotation
from megatron_vlm.data.sources.message_formats import EntryError, read_turns, shown

Entry = dict[str, Any]

CONVERTERS: dict[str, type[Converter]] = {}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MIN_CHOICES = 2


def register(converter: type[Converter]) -> type[Converter]:
    """Class decorator: make a converter available by its name."""
    CONVERTERS[converter.name] = converter
    return converter


class Converter(ABC):
    """Base class. The first line of a converter's docstring is its --help text.

    Every entry is validated as training data is, and its images are decoded, before it is written.
    """

    name: str

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @classmethod  # noqa: B027  (optional to override)
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of this converter."""

    def split(self, row: Entry) -> Iterator[Entry]:
        """The samples of a row; by default the row is one."""
        yield row

    @abstractmethod
    def entry(self, row: Entry, images: ImageStore) -> Entry:
        """Convert a sample to a LLaVA entry. An entry without an id gets one later.

        Raises:
            RowError: it cannot be converted. Any other exception rejects it, too.
        """

    def combine(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """The entries to write, made of all converted ones; by default as they are."""
        yield from entries


def conversation(*texts: str, image: str | list[str] | None = None) -> Entry:
    """An entry of alternating questions and answers.

    If no question has an image placeholder, placeholders of all images precede the first question.
    """
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    return _entry(turns, [] if image is None else [image] if isinstance(image, str) else image)


def _entry(turns: list[Turn], images: list[str]) -> Entry:
    """An entry with a placeholder for each image; those that the questions have stay."""
    questions = [number for number, turn in enumerate(turns) if turn.role == "human"]
    if questions and not any(IMAGE_PLACEHOLDER in turns[number].text for number in questions):
        first = turns[questions[0]]
        turns[questions[0]] = Turn(first.role, f"{IMAGE_PLACEHOLDER}\n" * len(images) + first.text)
    entry: Entry = {"conversations": [{"from": turn.role, "value": turn.text} for turn in turns]}
    return {"image": images if len(images) > 1 else images[0], **entry} if images else entry


def column_arguments(parser: argparse.ArgumentParser, **columns: str) -> None:
    """Add a flag --NAME-column with a default for each column."""
    for name, default in columns.items():
        parser.add_argument(f"--{name}-column", default=default, metavar="NAME", help=f"default: {default}")


def images_of(row: Entry, column: str, images: ImageStore) -> list[str]:
    """The paths of the images in a column that may be empty.

    Raises:
        RowError: an image is missing or unreadable, or another column seems to hold the images.
    """
    paths = images.take_all(row.get(column))
    if not paths and (suspect := image_like_key(row)) and suspect != column:
        what = f"{column!r} has no image, but {suspect!r} seems to: give --image-column {suspect}"
        raise RowError("unknown image key", what)
    return paths


@register
class QuestionAnswer(Converter):
    """a question and an answer about an image, as in VQA datasets; rows without an image become text-only samples"""

    name = "qa"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", question="question", answer="answer")
        parser.add_argument("--suffix", default="", metavar="TEXT", help="appended to each question on a new line")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        options = self.options
        question, answer = text_cell(row, options.question_column), answer_cell(row, options.answer_column)
        if options.suffix:
            question = f"{question}\n{options.suffix}"
        return conversation(question, answer, image=images_of(row, options.image_column, images))


@register
class Conversations(Converter):
    """whole conversations with or without images: turns as from/value, role/content, or user/assistant pairs"""

    name = "conversations"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", turns="conversations")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        column = self.options.turns_column
        if column not in row and "messages" in row:
            column = "messages"
        try:
            turns, inline = read_turns(cell(row, column), column)
        except EntryError as error:
            raise RowError(error.reason, error.what) from None
        paths = [images.take(image) for image in inline] or images_of(row, self.options.image_column, images)
        return entry_of(row, turns, paths)


def entry_of(row: Entry, turns: list[Turn], images: list[str]) -> Entry:
    """An entry with the id of the row, if it has one; placeholders as in `conversation`."""
    identity = {} if is_missing(row.get("id")) else {"id": str(row["id"])}
    return {**identity, **_entry(turns, images)}


@register
class Captions(Converter):
    """an image with one or several captions; each is the answer to a random prompt of a pool"""

    name = "captions"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", caption="caption")
        parser.add_argument("--prompts", default="caption", metavar="POOL|FILE",
                            help=f"{', '.join(PROMPTS)}, or a file with one prompt per line")  # fmt: skip
        parser.add_argument("--seed", type=int, default=0)

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.pool = PROMPTS.get(options.prompts) or _read_pool(Path(options.prompts))

    def split(self, row: Entry) -> Iterator[Entry]:
        """Each caption of a list of captions is a sample of its own."""
        column = self.options.caption_column
        captions = row.get(column)
        if isinstance(captions, str):
            captions = parse_list(captions) or captions
        for caption in (captions or [None]) if isinstance(captions, list) else [captions]:
            yield {**row, column: caption}

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        caption = answer_cell(row, self.options.caption_column)
        image = images.take(cell(row, self.options.image_column))
        # Seeded by the content of the row, so that the prompts do not depend on how rows are split over jobs.
        prompt = random.Random(f"{self.options.seed} {image} {caption}").choice(self.pool)
        return conversation(prompt, caption, image=image)


def _read_pool(file: Path) -> tuple[str, ...]:
    try:
        pool = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        choices = ", ".join(PROMPTS)
        raise DataError(
            f"--prompts {file}: neither {choices} nor a file that can be read ({error}). Give one."
        ) from error
    if not pool:
        raise DataError(f"--prompts {file}: the file has no prompt. Write one per line.")
    return pool


@register
class OcrWords(Converter):
    """words with bounding boxes, as in OCR datasets; the answer is their text in reading order, line by line"""

    name = "ocr"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", words="words")
        parser.add_argument("--prompt", default="Read all text in this image, from top to bottom.", metavar="TEXT")
        parser.add_argument("--unreadable", default="###", metavar="TEXT", help="text of words to skip")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        words = []
        for word in list_cell(row, self.options.words_column):
            if not isinstance(word, dict):
                raise RowError("bad word", f"{shown(word)} is not an object with text and box")
            if not is_missing(word.get("text")) and word["text"] != self.options.unreadable:
                words.append((text_cell(word, "text"), *parse_box(word)))
        if not words:
            raise RowError("no words", "no word is readable")
        image = images.take(cell(row, self.options.image_column))
        return conversation(self.options.prompt, reading_order(words), image=image)


@register
class Choice(Converter):
    """a multiple-choice question; the answer is the letter, and a rationale, if there is one, becomes a second turn"""

    name = "choice"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(
            parser, image="image", question="question", choices="choices", answer="answer", rationale="rationale"
        )
        parser.add_argument("--why", default="Why?", metavar="TEXT", help="question that the rationale answers")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        options = self.options
        choices = self._choices(row)
        correct = self._correct_index(cell(row, options.answer_column), choices)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
        question = f"{text_cell(row, options.question_column)}\n{listed}\nAnswer with the letter of the right choice."
        texts = [question, _LETTERS[correct]]
        if not is_missing(row.get(options.rationale_column)):
            texts += [options.why, text_cell(row, options.rationale_column)]
        return conversation(*texts, image=images_of(row, options.image_column, images))

    def _choices(self, row: Entry) -> list[str]:
        column = self.options.choices_column
        value = row.get(column)
        if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC: {text: [...], label: [...]}
            row = {column: value["text"]}
        choices = [text_cell({column: choice}, column) for choice in list_cell(row, column)]
        if not _MIN_CHOICES <= len(choices) <= len(_LETTERS):
            raise RowError("bad choices", f"{len(choices)} choices, expected {_MIN_CHOICES} to {len(_LETTERS)}")
        if len(set(choices)) < len(choices):
            raise RowError("bad choices", f"two of {shown(choices)} are the same")
        return choices

    def _correct_index(self, answer: Any, choices: list[str]) -> int:
        """Index of the correct choice. `answer` is its index, its letter or its text."""
        text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
        if text in choices:
            return choices.index(text)
        letter = text.strip(" .()").upper()
        if isinstance(answer, str) and len(letter) == 1 and letter in _LETTERS[: len(choices)]:
            return _LETTERS.index(letter)
        if text.isdecimal() and int(text) < len(choices):
            return int(text)
        raise RowError("unknown answer", f"{shown(answer)} is none of {shown(choices)}")


@register
class MergeTurns(Converter):
    """LLaVA entries; consecutive entries with the same image are merged into one conversation"""

    name = "merge"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--turns", type=int, default=5, metavar="N", help="most questions per conversation")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        annotation = parse_annotation(row, 0, "the input")
        identity = {"id": row["id"]} if "id" in row else {}
        return {**identity, **_entry(annotation.turns, [images.take(path) for path in annotation.image_paths])}

    def combine(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        merged: Entry | None = None
        for entry in entries:
            if merged is not None and self._can_merge(merged, entry):
                for turn in entry["conversations"][::2]:
                    turn["value"] = turn["value"].replace(IMAGE_PLACEHOLDER, "").strip()
                merged["conversations"] += entry["conversations"]
                continue
            if merged is not None:
                yield merged
            merged = entry
        if merged is not None:
            yield merged

    def _can_merge(self, merged: Entry, entry: Entry) -> bool:
        turns = merged["conversations"] + entry["conversations"]
        same_image = entry.get("image") is not None and entry["image"] == merged.get("image")
        return same_image and len(turns) <= 2 * self.options.turns and all(turn["from"] != "system" for turn in turns)
