"""Entries of annotation files: one conversation each, in LLaVA's or another form, checked one by one.

An entry is `{"id": …, "image": "path" or ["path", …], "conversations": [{"from": "human"|"gpt", "value": …}, …]}`.
`images` is read as `image`, `messages` as `conversations`, and turns in all forms of `message_formats`. An absent, null
or empty `image` means text only. Other keys are ignored, but one that seems to name the image is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.sources.message_formats import EntryError, read_turns, shown

CONVERSATION_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("image", "images")
_IMAGE_WORD = re.compile(r"image|img|picture|photo|pixel|frame", re.IGNORECASE)
_IMAGE_COLUMN = re.compile(r"(image|img|picture|photo)s?_?(path|file|name|filename|url)?s?", re.IGNORECASE)
_IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclass
class Annotation:
    """One validated entry."""

    id: str
    image_paths: list[str]
    """As in the file, relative to the image folder."""
    turns: list[Turn]
    """Alternating human and gpt turns, after at most one of system. The last is gpt."""


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
    try:
        return _parse(entry, sample_id)
    except EntryError as error:
        raise SampleError(sample_id, file, error.reason, error.what, error.remedy) from None


def _parse(entry: Any, sample_id: str) -> Annotation:
    if not isinstance(entry, dict):
        raise EntryError("not an entry", f"expected an object, got {type(entry).__name__}", "Fix or remove it.")
    if entry.get("video"):
        remedy = "Remove the entry, or make images of its frames: convert-dataset video."
        raise EntryError("video", "videos are not supported", remedy)
    paths = _image_paths(entry)
    key, conversation = _conversation(entry)
    turns, inline = read_turns(conversation, key)
    if inline and paths:
        what = f"{len(paths)} images in image and {len(inline)} in the content of the messages"
        raise EntryError("image count mismatch", what, "Name each image once.")
    paths = [_checked_path(path) for path in inline] or paths
    turns = _alternating(turns)
    placeholders = count_placeholders(turns)
    if not paths and (suspect := image_like_key(entry)):
        what = f"{suspect} seems to name the image, but images are read from image or images"
        raise EntryError("unknown image key", what, f"Rename {suspect} to image, or remove it.")
    if placeholders != len(paths):
        what = f"the questions have {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(paths)} images"
        raise EntryError("image count mismatch", what, "Write one placeholder per image.")
    if turns[-1].role == "human":  # nothing to learn from a question without an answer: it goes, with its images
        turns = turns[:-1]
        paths = paths[: count_placeholders(turns)]
    return Annotation(sample_id, paths, turns)


def is_url(path: str) -> bool:
    """Whether an image path is a URL, of whatever kind. In a shard it is only a name."""
    return _URL.match(path) is not None


def count_placeholders(turns: list[Turn]) -> int:
    """Number of images in the questions among these turns."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")


def _image_paths(entry: dict[str, Any]) -> list[str]:
    given = {key: entry[key] for key in IMAGE_KEYS if entry.get(key) not in (None, "", [])}
    if len(given) == 2 and given["image"] != given["images"]:
        raise EntryError("bad image path", "both image and images are given, and they differ", "Keep one of them.")
    for images in given.values():
        return [_checked_path(path) for path in (images if isinstance(images, list) else [images])]
    return []


def _checked_path(path: Any) -> str:
    if not isinstance(path, str) or not path.strip():
        remedy = "Set it to a path or a list of paths (convert-dataset stores image bytes as files)."
        raise EntryError("bad image path", f"image is {shown(path)}", remedy)
    return path


def _conversation(entry: dict[str, Any]) -> tuple[str, Any]:
    """(key, value) of the conversation."""
    for key in CONVERSATION_KEYS:
        if entry.get(key) is not None:
            return key, entry[key]
    keys = ", ".join(sorted(map(str, entry)))[:200]
    what = f"conversations is absent or empty; the keys are {keys or 'none'}"
    raise EntryError("no conversation", what, "Add a question and its answer, or convert the file: convert-dataset.")


def image_like_key(entry: dict[str, Any]) -> str | None:
    """A key that is not read, and whose name and value seem to be those of an image."""
    for key, value in entry.items():
        if key in (*IMAGE_KEYS, *CONVERSATION_KEYS):
            continue
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            first = next((first[name] for name in ("bytes", "path", "url") if first.get(name)), None)
        if not first or not isinstance(first, str | bytes):
            continue
        named = _IMAGE_WORD.search(str(key)) is not None
        if isinstance(first, bytes):
            is_image = named
        else:
            is_image = bool(_IMAGE_FILE.search(first) or (named and is_url(first)) or _IMAGE_COLUMN.fullmatch(str(key)))
        if is_image:
            return str(key)
    return None


def _alternating(turns: list[Turn]) -> list[Turn]:
    """The turns after checking their order and answers.

    Raises:
        EntryError: questions and answers do not alternate, or an answer is empty or has an image.
    """
    system = turns[:1] if turns[0].role == "system" else []
    turns = turns[len(system) :]
    # Some published datasets have conversations that start with an answer. That turn answers nothing and is dropped.
    if turns and turns[0].role == "gpt":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn.role == "system":
            what = "a system turn after the first turn"
            raise EntryError("turns out of order", what, "Move its text to the start, or remove it.")
        if turn.role != ("human", "gpt")[number % 2]:
            what = f"two turns of {turn.role} in a row"
            raise EntryError("turns out of order", what, "human and gpt must alternate.")
        if turn.role == "gpt" and not turn.text.strip():
            what = f"answer {number // 2} is empty"
            raise EntryError("empty answer", what, "Write an answer or remove the turn.")
        if turn.role == "gpt" and IMAGE_PLACEHOLDER in turn.text:
            what = f"answer {number // 2} has {IMAGE_PLACEHOLDER}"
            raise EntryError("image in an answer", what, "Move it to a question.")
    if system and IMAGE_PLACEHOLDER in system[0].text:
        raise EntryError("image in an answer", f"the system turn has {IMAGE_PLACEHOLDER}", "Move it to a question.")
    if len(turns) < 2:
        what = "the conversation does not end with an answer"
        raise EntryError("no answer", what, "Add one or remove the question.")
    return [*system, *turns]
