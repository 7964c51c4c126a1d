"""Where the entries of a JSON file lie, found in one pass that holds a few megabytes of it.

Errors are ValueErrors whose text goes on from "annotation file NAME …".
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 1 << 22
LONGEST_ENTRY = 1 << 26
"""Bytes. An entry that has not ended by then is taken for a damaged one."""
_SPACE = " \t\n\r"
_ENDS = frozenset(_SPACE + ",]")
"""What may follow an entry."""


def find_lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Bounds, in bytes, of the lines that are not empty.

    Raises:
        ValueError: the file is not UTF-8.
    """
    end = _skip_mark(file)
    for line in file:
        start, end = end, end + len(line)
        if line.strip():
            yield start, end


def find_items(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Bounds, in bytes, of the items of the list that the file holds.

    Raises:
        ValueError: it is no JSON, no list, or not UTF-8.
    """
    text = _Window(file, _skip_mark(file))
    first = text.next_mark()
    if first != "[":
        raise ValueError(
            f"begins with {first!r} where a list of entries begins with '['. Entries one a line go into a .jsonl file."
            if first
            else "has no entry"
        )
    mark = text.next_mark(peek=True)
    if mark == "]":
        text.next_mark()
    while mark != "]":
        yield text.next_value()
        mark = text.next_mark()
        if mark not in ("]", ","):
            raise text.wrong("',' or ']' is missing after an entry")
    if text.next_mark():
        raise text.wrong("something follows the list")


class _Window:
    """A part of the file, moved on as it is read.

    Bytes are looked at as Latin-1: a character is a byte then, so that places in the text are places in the file, and
    all that marks the structure of JSON is ASCII, in UTF-8 as in Latin-1.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self._text, self._place = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def next_mark(self, peek: bool = False) -> str:
        """The next character that is no space, which is passed unless `peek`; "" at the end of the file."""
        while True:
            while self._place < len(self._text):
                character = self._text[self._place]
                if character not in _SPACE:
                    self._place += not peek
                    return character
                self._place += 1
            if not self._extend():
                return ""

    def next_value(self) -> tuple[int, int]:
        """Bounds in the file of the next value, which is passed."""
        self.next_mark(peek=True)
        while True:
            try:
                _, end = self._decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if len(self._text) - self._place > LONGEST_ENTRY or not self._extend():
                    self._place = error.pos
                    raise self.wrong(error.msg) from error
            else:
                # the digits at the end of the window may not be all of their number
                if self._text[end : end + 1] in _ENDS or not self._extend():
                    bounds = self._start + self._place, self._start + end
                    self._place = end
                    return bounds

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"is not JSON: {what}, at byte {self._start + self._place}")

    def _extend(self) -> bool:
        """Read on, and let go of what was passed; False, and nothing else, at the end of the file."""
        kept = self._text[self._place :]
        read = self._file.read(max(_BLOCK, len(kept)))
        if read:
            self._start, self._place, self._text = self._start + self._place, 0, kept + read.decode("latin-1")
        return bool(read)


def _skip_mark(file: BinaryIO) -> int:
    """Pass a byte-order mark; returns its length."""
    first = file.read(4)
    encoding = json.detect_encoding(first)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"is in {encoding}: write it in utf-8")
    return file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
