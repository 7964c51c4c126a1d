"""LLaVA-style annotation files: one conversation per entry, checked entry by entry.

An entry is `{"id": …, "image": "path" or ["path", …], "conversations": [{"from": "human"|"gpt", "value": …}, …]}`. An
absent, null or empty `image` means text only. Other keys are tolerated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.errors import DataError, SampleError

_ROLES = ("human", "gpt")


@dataclass
class Annotation:
    """One entry, checked."""

    id: str
    image_paths: list[str]
    """As written, relative to the image folder."""
    turns: list[Turn]
    """human and gpt in turn, human first, gpt last."""


class AnnotationFile:
    """The entries of one `.json` (a list) or `.jsonl` file, held as text so that worker processes share the memory."""

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            DataError: it is missing, is not JSON, is not a list, or is empty.
        """
        self.path = Path(path)
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"annotation file {self.path} cannot be read: {error.strerror}. Check data_path."
            ) from error
        entries = self._lines(text) if self.path.suffix == ".jsonl" else self._items(text)
        if not entries:
            raise DataError(f"annotation file {self.path} has no entry")
        self._ends = np.cumsum([len(entry) for entry in entries], dtype=np.int64)
        self._text = b"".join(entries)

    def _lines(self, text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if line.strip()]

    def _items(self, text: bytes) -> list[bytes]:
        try:
            items = json.loads(text)
        except ValueError as error:
            raise DataError(f"annotation file {self.path} is not JSON: {error}") from error
        if not isinstance(items, list):
            raise DataError(f"annotation file {self.path} holds a {type(items).__name__}, not a list of entries")
        return [json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass") for item in items]

    def __len__(self) -> int:
        return len(self._ends)

    def entry(self, index: int) -> Any:
        """Entry `index` as parsed JSON.

        Raises:
            SampleError: a line of a .jsonl file is not JSON.
        """
        start = int(self._ends[index - 1]) if index else 0
        try:
            return json.loads(self._text[start : int(self._ends[index])].decode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise SampleError(
                f"#{index}", str(self.path), "not JSON", str(error), "Mend or remove the line."
            ) from error


def parse_annotation(entry: Any, index: int, file: str) -> Annotation:
    """Check one entry.

    Args:
        entry: parsed JSON.
        index: its place in the file; names it where it has no id.
        file: for messages.

    Raises:
        SampleError: with what is wrong; its `reason` is one of a few.
    """
    sample_id = str(entry["id"]) if isinstance(entry, dict) and entry.get("id") is not None else f"#{index}"

    def bad(reason: str, what: str, remedy: str) -> SampleError:
        return SampleError(sample_id, file, reason, what, remedy)

    if not isinstance(entry, dict):
        raise bad("not an entry", f"a {type(entry).__name__} where an object is expected", "Mend or remove it.")
    if entry.get("video"):
        raise bad("video", "videos are not read", "Remove the entry, or give frames as a list of images.")
    images = entry.get("image")
    paths = [] if images in (None, "", []) else images if isinstance(images, list) else [images]
    if not all(isinstance(path, str) and path for path in paths):
        raise bad("bad image path", f"image is {images!r}", "Give a path or a list of paths.")
    turns = _parse_turns(entry.get("conversations"), bad)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")
    if placeholders != len(paths):
        raise bad(
            "image count mismatch",
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the questions for {len(paths)} images",
            "Write one placeholder for each image.",
        )
    return Annotation(sample_id, paths, turns)


def _parse_turns(conversations: Any, bad: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise bad("no conversation", "conversations is absent or empty", "Add a question and its answer.")
    turns = []
    for number, message in enumerate(conversations):
        role = message.get("from") if isinstance(message, dict) else None
        text = message.get("value") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise bad("unknown role", f"turn {number} is from {role!r}", "Roles are human and gpt.")
        if not isinstance(text, str):
            raise bad("no text", f"turn {number} has the value {text!r}", "Give it a text.")
        turns.append(Turn(role, text))
    # Published sets have conversations that open with an answer; that turn answers nothing and is left out.
    if turns[0].role != "human":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn.role != _ROLES[number % 2]:
            raise bad("turns out of order", f"two turns of {turn.role} in a row", "human and gpt must take turns.")
        if turn.role == "gpt" and not turn.text.strip():
            raise bad("empty answer", f"answer {number // 2} is empty", "Give it a text or remove the turn.")
        if turn.role == "gpt" and IMAGE_PLACEHOLDER in turn.text:
            raise bad(
                "image in an answer", f"answer {number // 2} has {IMAGE_PLACEHOLDER}", "Images go into questions."
            )
    if not turns or turns[-1].role != "gpt":
        raise bad("no answer", "the conversation does not end with an answer", "Add one, or remove the question.")
    return turns
