"""Conversations to token ids, with labels on the answers only: by the tokenizer's chat template, or by `instella`.

Under `instella`, a conversation is an end-of-sequence token followed by its turns: `<|user|>\\n{question}\\n` for a
question, `<|assistant|>\\n{answer}` + end-of-sequence token + `\\n` for an answer. The answer, its end-of-sequence
token and the newline after it are supervised tokens. Questions, roles and image tokens are not. A system turn, which
the published data has not, is `<|system|>\\n{text}\\n`, as in the other models with these roles.
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
"""Name and version of this chat template."""

_SYSTEM = "<|system|>\n"
_USER = "<|user|>\n"
_ASSISTANT = "<|assistant|>\n"
_TURN_END = "\n"
_CAPTION_MARK = "QA_GT_caption_based_noisy"
"""Marker in the questions of some published annotations. It is removed."""


class Turn(NamedTuple):
    """One message."""

    role: str
    """human, gpt or, in the first turn, system"""
    text: str


@dataclass
class EncodedConversation:
    """The L tokens of one conversation, image tokens included."""

    ids: np.ndarray
    """[L] int64; image tokens have the id image_token_index."""
    labels: np.ndarray
    """[L] int64, not shifted: labels[i] is ids[i] if token i is supervised, else IGNORE_INDEX."""
    image_starts: list[int]
    """Position of the first token of each image."""


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """What conversations are encoded with, besides the tokenizer; part of the cache key of the length index."""
    return TEMPLATE if tokenizer.chat_template is None else tokenizer.chat_template.fingerprint


def move_image_first(question: str) -> str:
    """Move a single `<image>` placeholder to the start of the question, as the published preprocessing does.

    Only a question that is changed is stripped. Questions with no or several placeholders stay as they are.
    """
    question = question.replace(_CAPTION_MARK, "")
    if question.count(IMAGE_PLACEHOLDER) == 1 and not question.startswith(IMAGE_PLACEHOLDER):
        rest = question.replace(IMAGE_PLACEHOLDER, "").strip()
        return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()
    return question


class _Encoder:
    """Concatenates the tokens of a conversation."""

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
        """Add text with placeholders. The text between two placeholders is tokenized by itself."""
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
        pending = ""  # a question and the assistant role after it are tokenized as one text
        for role, text in turns:
            if role == "human":
                pending += f"{_USER}{move_image_first(text)}{_TURN_END}"
            elif role == "gpt":
                self.add_question(pending + _ASSISTANT)
                pending = ""
                self.add(self.tokenizer.encode(text.strip()), supervised=True)
                self.add([self.tokenizer.eos_id, *newline], supervised=True)
            elif role == "system":
                pending += f"{_SYSTEM}{text}{_TURN_END}"
            else:
                raise ValueError(f"unknown role {role!r}: roles are human, gpt and system")
        if pending:
            self.add_question(pending + _ASSISTANT)

    def finish(self) -> EncodedConversation:
        return EncodedConversation(
            np.asarray(self.ids, dtype=np.int64), np.asarray(self.labels, dtype=np.int64), self.image_starts
        )


def _encode(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int, prompt: bool
) -> EncodedConversation:
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role != "gpt")
    if placeholders != len(image_lengths):
        raise ValueError(
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(image_lengths)} images: "
            "each image needs one placeholder in a question"
        )
    if tokenizer.chat_template is not None:
        numbers, said, starts = tokenizer.chat_template.encode(turns, image_lengths, image_token_index, prompt)
        ids = np.asarray(numbers, dtype=np.int64)
        return EncodedConversation(ids, np.where(said, ids, IGNORE_INDEX), starts)
    encoder = _Encoder(tokenizer, image_lengths, image_token_index)
    encoder.add_turns(turns)
    return encoder.finish()


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int
) -> EncodedConversation:
    """Encode a conversation for training.

    Args:
        turns: (role, text) of each turn, role human, gpt or system. `<image>` in a question stands for the next image.
        tokenizer: encodes text; its eos_id starts the conversation and ends every answer.
        image_lengths: number of image tokens of each image, in the order of the placeholders.
        image_token_index: id of image tokens; not used by the tokenizer.

    Raises:
        ValueError: the numbers of placeholders and images differ, there is no turn, the last turn is not an answer, or
            a role is unknown.
    """
    if turns and turns[-1][0] != "gpt":
        raise ValueError("the last turn is not an answer: a training conversation must end with gpt")
    return _encode(turns, tokenizer, image_lengths, image_token_index, prompt=False)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_lengths: Sequence[int], image_token_index: int
) -> EncodedConversation:
    """Encode a prompt: a conversation as in training, ending in the assistant's role.

    Arguments and errors are those of `encode_conversation`, but the last turn must be a question. Earlier answers have
    the same labels as in training.
    """
    if turns and turns[-1][0] != "human":
        raise ValueError("the last turn is not a question: a prompt must end with human")
    return _encode(turns, tokenizer, image_lengths, image_token_index, prompt=True)
