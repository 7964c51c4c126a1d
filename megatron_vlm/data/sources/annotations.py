"""LLaVA-style annotation files: one conversation per entry, checked entry by entry.

An entry is `{"id": …, "image": "path" or ["path", …], "conversations": [{"from": "human"|"gpt", "value": …}, …]}`. An
absent, null or empty `image` means text only. Other keys are tolerated.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.sources.json_index import find_items, find_lines

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
    """The entries of one `.json` (a list) or `.jsonl` file: where each lies in it is held, not what it says.

    An entry is read when it is asked for. Millions of them would take gigabytes in every rank; in the system's file
    cache they lie once for all ranks and workers of a machine.
    """

    def __init__(self, path: str | Path) -> None:
        """Find the entries.

        Raises:
            DataError: the file is missing, is no list of entries, or is empty.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                bounds = array("q")
                for start, end in find_lines(file) if self.path.suffix == ".jsonl" else find_items(file):
                    bounds.extend((start, end))
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise DataError(
                f"annotation file {self.path} cannot be read: {error.strerror}. Check data_path."
            ) from error
        except ValueError as error:
            raise DataError(f"annotation file {self.path} {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._bounds = np.frombuffer(bounds, np.int64).reshape(-1, 2)
        if not len(self._bounds):
            raise DataError(f"annotation file {self.path} has no entry")

    def __len__(self) -> int:
        return len(self._bounds)

    def entry(self, index: int) -> Any:
        """Entry `index` as parsed JSON.

        Raises:
            SampleError: it is not JSON: a bad line of a .jsonl file, or the file was written to since it was opened.
        """
        start, end = self._bounds[index].tolist()
        try:
            return json.loads(os.pread(self._descriptor, end - start, start).decode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise SampleError(
                f"#{index}", str(self.path), "not JSON", str(error), "Mend or remove the entry."
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
    sample_id = sample_id.encode("utf-8", "backslashreplace").decode()  # it must be fit to be printed

    def bad(reason: str, what: str, remedy: str) -> SampleError:
        return SampleError(sample_id, file, reason, what, remedy)

    if not isinstance(entry, dict):
        raise bad("not an entry", f"{type(entry).__name__} where an object is expected", "Mend or remove it.")
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


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes it: JSON may spell out what no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        if not _is_unicode(text):
            raise bad("no text", f"turn {number} has half a surrogate pair, which is no character", "Mend the text.")
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
