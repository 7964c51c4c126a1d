"""The general kinds of data sets, and how to add one.

A kind is a class with a name, its own arguments, and a method that makes entries of rows:

    @register
    class Riddles(Converter):
        \"\"\"riddle, solution -> one question and its answer\"\"\"

        name = "riddles"

        def entry(self, row, images):
            return conversation(row["riddle"], row["solution"])

`tools/convert_dataset.py riddles --plugin riddles.py ...` knows it then.
"""

from __future__ import annotations

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.data.prepare.prompts import PROMPTS
from megatron_vlm.data.prepare.tables import ImageStore, RowError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER

Entry = dict[str, Any]
Problem = Callable[[Entry, RowError], None]

KINDS: dict[str, type[Converter]] = {}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def register(kind: type[Converter]) -> type[Converter]:
    """Make a kind known by its name."""
    KINDS[kind.name] = kind
    return kind


class Converter(ABC):
    """One kind of data set. The first line of its docstring is its help."""

    name: str

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @classmethod  # noqa: B027  (most have some, none need any)
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Flags of its own."""

    @abstractmethod
    def entry(self, row: Entry, images: ImageStore) -> Entry:
        """A LLaVA entry; without an id it is given one.

        Raises:
            RowError: the row cannot be converted.
        """

    def entries(self, rows: Iterator[Entry], images: ImageStore, problem: Problem) -> Iterator[Entry]:
        """All entries. `problem(row, error)` is told of rows that give none."""
        for row in rows:
            try:
                yield self.entry(row, images)
            except RowError as error:
                problem(row, error)


def cell(row: Entry, column: str) -> Any:
    """What is in a column.

    Raises:
        RowError: there is no such column, or nothing in it.
    """
    value = row.get(column)
    if value is None or value == "":
        raise RowError("missing column", f"nothing in {column!r}; there are {sorted(row)}")
    return value


def conversation(*texts: str, image: str | list[str] | None = None) -> Entry:
    """An entry of questions and answers in turn; placeholders for its images stand before the first question."""
    count = 0 if image is None else 1 if isinstance(image, str) else len(image)
    first = f"{IMAGE_PLACEHOLDER}\n" * count + texts[0]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate((first, *texts[1:]))]
    return {**({"image": image} if image is not None else {}), "conversations": turns}


def column_arguments(parser: argparse.ArgumentParser, **columns: str) -> None:
    """A flag --NAME-column for each, with its default."""
    for name, default in columns.items():
        parser.add_argument(f"--{name}-column", default=default, metavar="NAME", help=f"default: {default}")


@register
class QuestionAnswer(Converter):
    """question and answer of an image: Hugging Face's VQA sets, or text alone where a row has no image"""

    name = "qa"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", question="question", answer="answer")
        parser.add_argument("--suffix", default="", metavar="TEXT", help="added to each question on a line of its own")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        options = self.options
        question, answer = str(cell(row, options.question_column)), cell(row, options.answer_column)
        answer = str(answer[0] if isinstance(answer, list) else answer)  # several people's answers: the first
        if options.suffix:
            question = f"{question}\n{options.suffix}"
        return conversation(question, answer, image=images.take_all(row.get(options.image_column)))


@register
class Conversations(Converter):
    """whole conversations, perhaps with image bytes: LLaVA's from/value, role/content, or pairs user/assistant"""

    name = "conversations"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", turns="conversations")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        texts = list(_texts(cell(row, self.options.turns_column)))
        image = images.take_all(row.get(self.options.image_column))
        count = len(image) if isinstance(image, list) else int(image is not None)
        there = "".join(texts).count(IMAGE_PLACEHOLDER)
        if there not in (0, count):
            raise RowError("image count mismatch", f"{there} {IMAGE_PLACEHOLDER} placeholders for {count} images")
        entry = conversation(*texts, image=image)
        if there:  # they stand where they belong
            entry["conversations"][0]["value"] = texts[0]
        return {**({"id": str(row["id"])} if row.get("id") is not None else {}), **entry}


_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant", "model")


def _texts(turns: Any) -> Iterator[str]:
    """Questions and answers in turn, of the forms in which sets have conversations.

    Raises:
        RowError: they do not take turns.
    """
    place = 0
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            break
        role = turn.get("from", turn.get("role"))
        if role is None and {"user", "assistant"} <= turn.keys():
            messages: list[tuple[Any, Any]] = [("user", turn["user"]), ("assistant", turn["assistant"])]
        else:
            messages = [(role, turn.get("value", turn.get("content")))]
        for who, text in messages:
            if who not in (_ASKING, _ANSWERING)[place % 2] or not isinstance(text, str):
                raise RowError("turns out of order", f"message {place} is {text!r} from {who!r}")
            place += 1
            yield text
    if place == 0 or place % 2:
        raise RowError("turns out of order", f"{place} messages, where each question has an answer")


@register
class Captions(Converter):
    """image and caption or several, asked for with one of a pool of prompts, drawn by the seed and the row"""

    name = "captions"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", caption="caption")
        parser.add_argument("--prompts", default="caption", metavar="POOL|FILE",
                            help=f"{', '.join(PROMPTS)}, or a file with a prompt on each line")  # fmt: skip
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
        # Of the row, not of the order: shares of a set that are converted apart get what the whole gets.
        prompt = random.Random(f"{self.options.seed} {image} {caption}").choice(self.pool or ())
        return conversation(prompt, caption, image=image)

    def entries(self, rows: Iterator[Entry], images: ImageStore, problem: Problem) -> Iterator[Entry]:
        """Several captions of an image, as a list, are an entry each."""
        column = self.options.caption_column

        def single() -> Iterator[Entry]:
            for row in rows:
                captions = row.get(column)
                for caption in captions or [None] if isinstance(captions, list) else [captions]:
                    yield {**row, column: caption}

        return super().entries(single(), images, problem)


@register
class Words(Converter):
    """words with their boxes, as OCR sets have them, to the text in reading order, line by line"""

    name = "ocr"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(parser, image="image", words="words")
        parser.add_argument("--prompt", default="Read all text in this image, from top to bottom.", metavar="TEXT")
        parser.add_argument("--unreadable", default="###", metavar="TEXT", help="marks words to leave out")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        words = []
        for word in cell(row, self.options.words_column):
            text = str(word.get("text", "")).strip()
            if text and text != self.options.unreadable:
                words.append((text, *_box(word)))
        if not words:
            raise RowError("no words", "no word can be read")
        image = images.take(cell(row, self.options.image_column))
        return conversation(self.options.prompt, reading_order(words), image=image)


def _box(word: Entry) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of `box`: these four, or the corners of a polygon [[x, y], ...]."""
    box = word.get("box")
    try:
        if isinstance(box, list) and isinstance(box[0], list):
            xs, ys = zip(*box, strict=True)
            return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
        left, top, right, bottom = map(float, box or ())
    except (TypeError, ValueError, IndexError):
        raise RowError("bad box", f"{box!r} of the word {word.get('text')!r}") from None
    return left, top, right, bottom


def reading_order(words: list[tuple[str, float, float, float, float]]) -> str:
    """Text of words (text, left, top, right, bottom): lines from top to bottom, each from left to right.

    A word is of a line if its middle is within half the height of the line's first word.
    """
    lines: list[list[tuple[str, float, float, float, float]]] = []
    for word in sorted(words, key=lambda word: (word[2] + word[4], word[1])):
        if lines:
            _, _, top, _, bottom = lines[-1][0]
            if abs((word[2] + word[4]) / 2 - (top + bottom) / 2) <= (bottom - top) / 2:
                lines[-1].append(word)
                continue
        lines.append([word])
    return "\n".join(" ".join(word[0] for word in sorted(line, key=lambda word: word[1])) for line in lines)


@register
class Choice(Converter):
    """question with choices and perhaps a rationale: the choice first, why in a second turn"""

    name = "choice"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        column_arguments(
            parser, image="image", question="question", choices="choices", answer="answer", rationale="rationale"
        )
        parser.add_argument("--why", default="Why?", metavar="TEXT", help="the question for the rationale")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        options = self.options
        choices = [str(choice) for choice in cell(row, options.choices_column)]
        right = self._right(cell(row, options.answer_column), choices)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
        question = f"{cell(row, options.question_column)}\n{listed}\nAnswer with the letter of the right choice."
        texts = [question, _LETTERS[right]]
        if rationale := row.get(options.rationale_column):
            texts += [options.why, str(rationale)]
        return conversation(*texts, image=images.take_all(row.get(options.image_column)))

    def _right(self, answer: Any, choices: list[str]) -> int:
        """Place of the right choice, of which the place, the letter or the text may be given."""
        if str(answer) in choices:
            return choices.index(str(answer))
        if isinstance(answer, str) and answer.strip(" .()").upper() in list(_LETTERS[: len(choices)]):
            return _LETTERS.index(answer.strip(" .()").upper())
        if str(answer).isdigit() and int(answer) < len(choices):
            return int(answer)
        raise RowError("unknown answer", f"{answer!r} is none of {choices}")


@register
class MergeTurns(Converter):
    """entries that follow each other and have the same image become one conversation of several turns"""

    name = "merge"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--turns", type=int, default=5, metavar="N", help="questions in one conversation at most")

    def entry(self, row: Entry, images: ImageStore) -> Entry:
        turns = cell(row, "conversations")
        texts = [str(turn.get("value", "")).replace(IMAGE_PLACEHOLDER, "").strip() for turn in turns]
        if len(texts) % 2 or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(texts) // 2):
            raise RowError("turns out of order", "human and gpt must take turns, and gpt has the last word")
        image = images.take_all(row.get("image"))
        return {**({"id": row["id"]} if "id" in row else {}), **conversation(*texts, image=image)}

    def entries(self, rows: Iterator[Entry], images: ImageStore, problem: Problem) -> Iterator[Entry]:
        merged: Entry | None = None
        for entry in super().entries(rows, images, problem):
            same = merged is not None and entry.get("image") is not None and entry["image"] == merged.get("image")
            if merged is not None and same and self._questions(merged) + self._questions(entry) <= self.options.turns:
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
