"""LLaVA-style annotation files: one conversation per entry, checked entry by entry.

An entry is `{"id": …, "image": "path" or ["path", …], "conversations": [{"from": "human"|"gpt", "value": …}, …]}`. An
absent, null or empty `image` means text only. Other keys are ignored.
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
    """One validated entry."""

    id: str
    image_paths: list[str]
    """As in the file, relative to the image folder."""
    turns: list[Turn]
    """Alternating human and gpt turns. The first is human, the last is gpt."""


class AnnotationFile:
    """The entries of one `.json` (a list) or `.jsonl` file. Only their byte offsets are held in memory.

    An entry is read from disk on access. Millions of parsed entries would take gigabytes in every rank, whereas the
    page cache is shared by all ranks and workers of a node.
    """

    def __init__(self, path: str | Path) -> None:
        """Index the entries.

        Raises:
            DataError: the file is missing, is not a list of entries, or is empty.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                offsets = array("q")
                for start, end in find_lines(file) if self.path.suffix == ".jsonl" else find_items(file):
                    offsets.extend((start, end))
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise DataError(
                f"annotation file {self.path} cannot be read: {error.strerror}. Check data_path."
            ) from error
        except ValueError as error:
            raise DataError(f"annotation file {self.path} {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._offsets = np.frombuffer(offsets, np.int64).reshape(-1, 2)
        if not len(self._offsets):
            raise DataError(f"annotation file {self.path} has no entry")

    def __len__(self) -> int:
        return len(self._offsets)

    def entry(self, index: int) -> Any:
        """Entry `index` as parsed JSON.

        Raises:
            SampleError: the entry is not JSON: a .jsonl file has a bad line, or the file changed after it was opened.
        """
        start, end = self._offsets[index].tolist()
        try:
            return json.loads(os.pread(self._descriptor, end - start, start).decode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise SampleError(
                f"#{index}", str(self.path), "not JSON", str(error), "Fix or remove the entry."
            ) from error


def parse_annotation(entry: Any, index: int, file: str) -> Annotation:
    """Validate one entry.

    Args:
        entry: parsed JSON.
        index: its index in the file, used as the id of an entry without one.
        file: for error messages.

    Raises:
        SampleError: the entry is invalid. `reason` is one of a fixed set, so that rejections can be counted by it.
    """
    sample_id = str(entry["id"]) if isinstance(entry, dict) and entry.get("id") is not None else f"#{index}"
    sample_id = sample_id.encode("utf-8", "backslashreplace").decode()  # an id with a lone surrogate cannot be printed

    def invalid(reason: str, what: str, remedy: str) -> SampleError:
        return SampleError(sample_id, file, reason, what, remedy)

    if not isinstance(entry, dict):
        raise invalid("not an entry", f"expected an object, got {type(entry).__name__}", "Fix or remove it.")
    if entry.get("video"):
        raise invalid("video", "videos are not supported", "Remove the entry, or give the frames as a list of images.")
    images = entry.get("image")
    paths = [] if images in (None, "", []) else images if isinstance(images, list) else [images]
    if not all(isinstance(path, str) and path for path in paths):
        raise invalid("bad image path", f"image is {images!r}", "Set it to a path or a list of paths.")
    turns = _parse_turns(entry.get("conversations"), invalid)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")
    if placeholders != len(paths):
        raise invalid(
            "image count mismatch",
            f"the questions have {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(paths)} images",
            "Write one placeholder per image.",
        )
    return Annotation(sample_id, paths, turns)


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer accepts `text`. JSON escapes may encode a lone surrogate, which is no valid character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_turns(conversations: Any, invalid: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise invalid("no conversation", "conversations is absent or empty", "Add a question and its answer.")
    turns = []
    for number, message in enumerate(conversations):
        role = message.get("from") if isinstance(message, dict) else None
        text = message.get("value") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise invalid("unknown role", f"turn {number} is from {role!r}", "Roles are human and gpt.")
        if not isinstance(text, str):
            raise invalid("no text", f"turn {number} has the value {text!r}", "Set it to a string.")
        if not _is_unicode(text):
            raise invalid("no text", f"turn {number} has a lone surrogate, which is no character", "Fix the text.")
        turns.append(Turn(role, text))
    # Some published datasets have conversations that start with an answer. That turn answers nothing and is dropped.
    if turns[0].role != "human":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn.role != _ROLES[number % 2]:
            raise invalid("turns out of order", f"two turns of {turn.role} in a row", "human and gpt must alternate.")
        if turn.role == "gpt" and not turn.text.strip():
            raise invalid("empty answer", f"answer {number // 2} is empty", "Write an answer or remove the turn.")
        if turn.role == "gpt" and IMAGE_PLACEHOLDER in turn.text:
            raise invalid(
                "image in an answer", f"answer {number // 2} has {IMAGE_PLACEHOLDER}", "Move it to a question."
            )
    if not turns or turns[-1].role != "gpt":
        raise invalid("no answer", "the conversation does not end with an answer", "Add one or remove the question.")
    return turns
