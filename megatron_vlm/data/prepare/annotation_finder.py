"""Finds the annotation files below folders, among files that only look like them."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.annotation_file import LINE_SUFFIXES, SUFFIXES
from megatron_vlm.data.sources.annotations import CONVERSATION_KEYS
from megatron_vlm.data.sources.json_index import find_items, find_lines

logger = logging.getLogger(__name__)

_OUR_LISTS = (".quarantine.jsonl", ".refused.jsonl", "quarantine.jsonl", "suspects.jsonl")
"""Ends of the names of our own lists of rejected samples."""
_ENTRIES_TRIED = 8
_MAX_NAMED = 5


def find_annotations(paths: Sequence[str | Path]) -> list[Path]:
    """Annotation files at `paths`.

    A folder stands for all annotation files below it. Hidden files and folders, our own lists of rejected samples, and
    files without conversations (for example metadata next to images) are left out; the last are named in the log.

    Raises:
        DataError: a folder has no annotation file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        candidates = sorted(_json_files(path))
        annotations = [file for file in candidates if _holds_conversations(file)]
        others = [str(file) for file in candidates if file not in set(annotations)]
        if others:
            names = ", ".join(others[:_MAX_NAMED]) + (", ..." if len(others) > _MAX_NAMED else "")
            logger.warning("%d files below %s hold no conversations and are left out: %s", len(others), path, names)
        if not annotations:
            raise DataError(f"folder {path} contains no {' or '.join(SUFFIXES)} file with conversations")
        found += annotations
    return found


def _json_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith(".") and not name.endswith(_OUR_LISTS):
                yield Path(parent, name)


def _holds_conversations(path: Path) -> bool:
    """Whether one of the first entries has a conversation, or the file is damaged: opening it will say how."""
    try:
        with path.open("rb") as file:
            if path.suffix not in LINE_SUFFIXES:
                if not file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                    return False
                file.seek(0)
            find = find_lines if path.suffix in LINE_SUFFIXES else find_items
            bounds = list(islice(find(file), _ENTRIES_TRIED))
            entries = []
            for start, end in bounds:
                file.seek(start)
                entries.append(json.loads(file.read(end - start)))
    except (OSError, ValueError, RecursionError):
        return True
    return any(isinstance(entry, dict) and any(key in entry for key in CONVERSATION_KEYS) for entry in entries)
