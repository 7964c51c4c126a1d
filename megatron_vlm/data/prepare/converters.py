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
from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.data.prepare.prompts import PROMPTS
from megatron_vlm.data.prepare.reading_order import parse_box, reading_order
from megatron_vlm.data.prepare.tables import ImageStore, RowError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER

Entry = dict[str, Any]
ErrorHandler = Callable[[Entry, RowError], None]

CONVERTERS: dict[str, type[Converter]] = {}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def register(converter: type[Converter]) -> type[Converter]:
    """Class decorator: make a converter available by its name."""
    CONVERTERS[converter.name] = converter
    return converter


class Converter(ABC):
    """Base class. The first line of a converter's docstring is its --help text."""

    name: str

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @classmethod  # noqa: B027  (optional to override)
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of this converter."""

    @abstractmethod
    def entry(self, row: Entry, images: ImageStore) -> Entry:
        """Convert a row to a LLaVA entry. An entry without an id gets one later.

        Raises:
            RowError: the row cannot be converted.
        """

    def entries(self, rows: Iterator[Entry], images: ImageStore, on_error: ErrorHandler) -> Iterator[Entry]:
        """Convert all rows. `on_error(row, error)` is called for each row that cannot be converted."""
        for row in rows:
            try:
                yield self.entry(row, images)
            except RowError as error:
                on_error(row, error)


def cell(row: Entry, column: str) -> Any:
    """The value of a column.

    Raises:
        RowError: the column is missing or empty.
    """
    value = row.get(column)
    if value is None or value == "":
        raise RowError("missing column", f"{column!r} is absent or empty; the columns are {sorted(row)}")
    return value


def conversation(*texts: str, image: str | list[str] | None = None) -> Entry:
    """An entry of alternating questions and answers. The image placeholders precede the first question."""
    count = 0 if image is None else 1 if isinstance(image, str) else len(image)
    first = f"{IMAGE_PLACEHOLDER}\n" * count + texts[0]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate((first, *texts[1:]))]
    return {**({"image": image} if image is not None else {}), "conversations": turns}


def column_arguments(parser: argparse.ArgumentParser, **columns: str) -> None:
    """Add a flag --NAME-column with a default for each column."""
    for name, default in columns.items():
        parser.add_argument(f"--{name}-column", default=default, metavar="NAME", help=f"default: {default}")


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
        question, answer = str(cell(row, options.question_column)), cell(row, options.answer_column)
        answer = str(answer[0] if isinstance(answer, list) else answer)  # of several annotators' answers, the first
        if options.suffix:
            question = f"{question}\n{options.suffix}"
        return conversation(question, answer, image=images.take_all(row.get(options.image_column)))


@register
class Conversations(Converter):
    """whole conversations with or without images: turns as from/value, role/content, or user/assistant pairs"""

    name = "conversations"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", turns="conversations")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        texts = list(_texts(cell(row, self.options.turns_column)))
        image = images.take_all(row.get(self.options.image_column))
        count = len(image) if isinstance(image, list) else int(image is not None)
        placeholders = "".join(texts).count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, count):
            raise RowError("image count mismatch", f"{placeholders} {IMAGE_PLACEHOLDER} for {count} images")
        entry = conversation(*texts, image=image)
        if placeholders:  # keep them where they are
            entry["conversations"][0]["value"] = texts[0]
        return {**({"id": str(row["id"])} if row.get("id") is not None else {}), **entry}


_USER_ROLES, _ASSISTANT_ROLES = ("human", "user"), ("gpt", "assistant", "model")


def _texts(turns: Any) -> Iterator[str]:
    """Alternating questions and answers of a conversation in any of the supported forms.

    Raises:
        RowError: questions and answers do not alternate.
    """
    count = 0
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            break
        role = turn.get("from", turn.get("role"))
        if role is None and {"user", "assistant"} <= turn.keys():
            messages: list[tuple[Any, Any]] = [("user", turn["user"]), ("assistant", turn["assistant"])]
        else:
            messages = [(role, turn.get("value", turn.get("content")))]
        for role, text in messages:
            if role not in (_USER_ROLES, _ASSISTANT_ROLES)[count % 2] or not isinstance(text, str):
                raise RowError("turns out of order", f"message {count} is {text!r} from {role!r}")
            count += 1
            yield text
    if count == 0 or count % 2:
        raise RowError("turns out of order", f"{count} messages, but each question needs an answer")


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
        self.pool = PROMPTS.get(options.prompts)
        if self.pool is None:
            with open(options.prompts, encoding="utf-8") as file:
                self.pool = tuple(line.strip() for line in file if line.strip())

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        caption = str(cell(row, self.options.caption_column)).strip()
        image = images.take(cell(row, self.options.image_column))
        # Seeded by the content of the row, so that the prompts do not depend on how rows are split over jobs.
        prompt = random.Random(f"{self.options.seed} {image} {caption}").choice(self.pool or ())
        return conversation(prompt, caption, image=image)

    def entries(self, rows: Iterator[Entry], images: ImageStore, on_error: ErrorHandler) -> Iterator[Entry]:
        """Each caption of a list of captions becomes an entry of its own."""
        column = self.options.caption_column

        def single_captions() -> Iterator[Entry]:
            for row in rows:
                captions = row.get(column)
                for caption in captions or [None] if isinstance(captions, list) else [captions]:
                    yield {**row, column: caption}

        return super().entries(single_captions(), images, on_error)


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
        for word in cell(row, self.options.words_column):
            text = str(word.get("text", "")).strip()
            if text and text != self.options.unreadable:
                words.append((text, *parse_box(word)))
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
        choices = [str(choice) for choice in cell(row, options.choices_column)]
        correct = self._correct_index(cell(row, options.answer_column), choices)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
        question = f"{cell(row, options.question_column)}\n{listed}\nAnswer with the letter of the right choice."
        texts = [question, _LETTERS[correct]]
        if rationale := row.get(options.rationale_column):
            texts += [options.why, str(rationale)]
        return conversation(*texts, image=images.take_all(row.get(options.image_column)))

    def _correct_index(self, answer: Any, choices: list[str]) -> int:
        """Index of the correct choice. `answer` is its index, its letter or its text."""
        if str(answer) in choices:
            return choices.index(str(answer))
        if isinstance(answer, str) and answer.strip(" .()").upper() in list(_LETTERS[: len(choices)]):
            return _LETTERS.index(answer.strip(" .()").upper())
        if str(answer).isdigit() and int(answer) < len(choices):
            return int(answer)
        raise RowError("unknown answer", f"{answer!r} is none of {choices}")


@register
class MergeTurns(Converter):
    """LLaVA entries; consecutive entries with the same image are merged into one conversation"""

    name = "merge"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--turns", type=int, default=5, metavar="N", help="most questions per conversation")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        turns = cell(row, "conversations")
        texts = [str(turn.get("value", "")).replace(IMAGE_PLACEHOLDER, "").strip() for turn in turns]
        if len(texts) % 2 or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(texts) // 2):
            raise RowError("turns out of order", "human and gpt must alternate, and the last turn must be gpt")
        image = images.take_all(row.get("image"))
        return {**({"id": row["id"]} if "id" in row else {}), **conversation(*texts, image=image)}

    def entries(self, rows: Iterator[Entry], images: ImageStore, on_error: ErrorHandler) -> Iterator[Entry]:
        merged: Entry | None = None
        for entry in super().entries(rows, images, on_error):
            same_image = merged is not None and entry.get("image") is not None and entry["image"] == merged.get("image")
            if merged and same_image and self._questions(merged) + self._questions(entry) <= self.options.turns:
                first = entry["conversations"][0]
                first["value"] = first["value"].replace(f"{IMAGE_PLACEHOLDER}\n", "")
                merged["conversations"] += entry["conversations"]
                continue
            if merged is not None:
                yield merged
            merged = entry
        if merged is not None:
            yield merged

    @staticmethod
    def _questions(entry: Entry) -> int:
        return len(entry["conversations"]) // 2
