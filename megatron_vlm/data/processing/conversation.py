"""The `instella` conversation template: turns to ids, with labels on the answers only.

A conversation is rendered as an end-of-sequence id, then for each turn `<|user|>\\n{question}\\n` or
`<|assistant|>\\n{answer}` + end-of-sequence id + `\\n`. Supervised are the answer, the end-of-sequence id and the
newline after it; questions, roles and image positions never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_vlm.data.processing.tokenizer import Tokenizer

IGNORE_INDEX = -100
IMAGE_PLACEHOLDER = "<image>"
TEMPLATE = "instella-1"
"""Name and version of what this module does to text; part of what cached lengths depend on."""

_USER = "<|user|>\n"
_ASSISTANT = "<|assistant|>\n"
_TURN_END = "\n"
_CAPTION_MARK = "QA_GT_caption_based_noisy"
"""A mark that some published annotations carry in their questions; it is no part of the question."""


class Turn(NamedTuple):
    """One message."""

    role: str
    """human or gpt"""
    text: str


@dataclass
class EncodedConversation:
    """Ids of one conversation, L of them, image positions included."""

    ids: np.ndarray
    """[L] int64; image positions hold the image token."""
    labels: np.ndarray
    """[L] int64, not shifted: labels[i] is ids[i] where position i is supervised, IGNORE_INDEX elsewhere."""
    image_starts: list[int]
    """Where each image's run of positions begins."""


def move_image_first(question: str) -> str:
    """The published rule for a question's placeholder: a single one that is not at the start is moved there.

    The rest of a question that is changed is stripped; others are left as they are.
    """
    question = question.replace(_CAPTION_MARK, "")
    if question.count(IMAGE_PLACEHOLDER) == 1 and not question.startswith(IMAGE_PLACEHOLDER):
        rest = question.replace(IMAGE_PLACEHOLDER, "").strip()
        return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()
    return question


class _Writer:
    """Lays pieces end to end."""

    def __init__(self, tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int) -> None:
        self.tokenizer = tokenizer
        self.image_lengths = image_lengths
        self.image_token_index = image_token_index
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.image_starts: list[int] = []

    def add(self, ids: list[int], supervised: bool = False) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORE_INDEX] * len(ids)

    def add_question(self, text: str) -> None:
        """A span of text with placeholders; each span between two of them is tokenized by itself."""
        spans = text.split(IMAGE_PLACEHOLDER)
        self.add(self.tokenizer.encode(spans[0]))
        for span in spans[1:]:
            self.image_starts.append(len(self.ids))
            self.add([self.image_token_index] * self.image_lengths[len(self.image_starts) - 1])
            if span:
                self.add(self.tokenizer.encode(span))

    def add_turns(self, turns: Sequence[Turn]) -> None:
        self.add([self.tokenizer.eos_id])
        newline = self.tokenizer.encode(_TURN_END)
        open_text = ""  # a question and the role after it are one span, as one text they are tokenized together
        for role, text in turns:
            if role == "human":
                open_text += f"{_USER}{move_image_first(text)}{_TURN_END}"
            elif role == "gpt":
                self.add_question(open_text + _ASSISTANT)
                open_text = ""
                self.add(self.tokenizer.encode(text.strip()), supervised=True)
                self.add([self.tokenizer.eos_id, *newline], supervised=True)
            else:
                raise ValueError(f"unknown role {role!r}: roles are human and gpt")
        if open_text:
            self.add_question(open_text + _ASSISTANT)

    def finish(self) -> EncodedConversation:
        return EncodedConversation(
            np.asarray(self.ids, dtype=np.int64), np.asarray(self.labels, dtype=np.int64), self.image_starts
        )


def _encode(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int
) -> EncodedConversation:
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "human")
    if placeholders != len(image_lengths):
        raise ValueError(
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(image_lengths)} images: "
            "every image needs one placeholder in a question"
        )
    writer = _Writer(tokenizer, image_lengths, image_token_index)
    writer.add_turns(turns)
    return writer.finish()


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int
) -> EncodedConversation:
    """A conversation for training.

    Args:
        turns: (role, text), role human or gpt; `<image>` in a question stands for the next image.
        tokenizer: gives the ids of text; its eos_id opens the conversation and closes every answer.
        image_lengths: positions each image fills, in the order of the placeholders.
        image_token_index: id that fills those positions; no text has it.

    Raises:
        ValueError: placeholders and images differ in number, no turn, last turn not an answer, or an unknown role.
    """
    if turns and turns[-1][0] != "gpt":
        raise ValueError("the last turn is no answer: a training conversation ends with gpt")
    return _encode(turns, tokenizer, image_lengths, image_token_index)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int
) -> EncodedConversation:
    """A conversation to be answered: as in training, ending in the assistant's role.

    Arguments and errors as in `encode_conversation`, but the last turn is a question. Earlier answers keep the labels
    they have in training.
    """
    if turns and turns[-1][0] != "human":
        raise ValueError("the last turn is no question: a prompt ends with human")
    return _encode(turns, tokenizer, image_lengths, image_token_index)
