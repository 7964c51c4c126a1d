"""Finds the files with annotation entries below folders, among files that only look like them."""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.annotation_file import LINE_SUFFIXES, SUFFIXES, is_annotation_file, suffix_of
from megatron_vlm.data.sources.annotations import CONVERSATION_KEYS
from megatron_vlm.data.sources.containers.columnar_file import PARQUET
from megatron_vlm.data.sources.containers.saved_dataset import saved_files
from megatron_vlm.data.sources.gzip_copy import GZIP
from megatron_vlm.data.sources.json_index import find_items, find_lines
from megatron_vlm.data.sources.open_source import TAR, check_splits, files_of, local_path

logger = logging.getLogger(__name__)

_OUR_LISTS = (".quarantine.jsonl", ".refused.jsonl", "quarantine.jsonl", "suspects.jsonl")
"""Ends of the names of our own lists of rejected samples."""
_ENTRIES_TRIED = 8
_MAX_NAMED = 5


def find_annotations(paths: Sequence[str | Path]) -> list[Path]:
    """Files with annotation entries at `paths`: annotations, Parquet, Arrow and tar files, lists of them in braces.

    A folder stands for all such files below it. Hidden files and folders, our own lists of rejected samples, and
    files without conversations (for example metadata next to images) are left out; the last are named in the log.

    Raises:
        DataError: a folder has no annotation file.
    """
    found: list[Path] = []
    for path in map(local_path, paths):
        if not path.is_dir():
            found += files_of(path)
            continue
        if saved := saved_files(path):
            found += saved
            continue
        candidates = sorted(_files_below(path))
        check_splits(path, [file for file in candidates if file.suffix in (PARQUET, TAR)])
        annotations = [file for file in candidates if _holds_conversations(file)]
        others = [str(file) for file in candidates if file not in set(annotations)]
        if others:
            names = ", ".join(others[:_MAX_NAMED]) + (", ..." if len(others) > _MAX_NAMED else "")
            logger.warning("%d files below %s hold no conversations and are left out: %s", len(others), path, names)
        if not annotations:
            kinds = ", ".join((*SUFFIXES, PARQUET, TAR))
            raise DataError(f"folder {path} contains no file with conversations ({kinds}). Give another.")
        found += annotations
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if (
                (is_annotation_file(name) or name.endswith((PARQUET, TAR)))
                and not name.startswith(".")
                and not name.endswith(_OUR_LISTS)
            ):
                yield Path(parent, name)


def _holds_conversations(path: Path) -> bool:
    """Whether one of the first entries has a conversation, or the file is damaged: opening it will say how."""
    if not is_annotation_file(path):
        return True
    lines = suffix_of(path) in LINE_SUFFIXES
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == GZIP else path.open("rb") as file:
            if not lines:
                if not file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                    return False
                file.seek(0)
            find = find_lines if lines else find_items
            bounds = list(islice(find(file), _ENTRIES_TRIED))
            entries = []
            for start, end in bounds:
                file.seek(start)
                entries.append(json.loads(file.read(end - start)))
    except (OSError, ValueError, RecursionError, EOFError, zlib.error):
        return True
    return any(isinstance(entry, dict) and any(key in entry for key in CONVERSATION_KEYS) for entry in entries)
