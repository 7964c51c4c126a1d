"""Byte offsets of the entries of a JSON file, found in one pass that keeps a few megabytes in memory.

Errors are ValueErrors whose text continues "annotation file NAME …".
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 1 << 22
MAX_ENTRY_BYTES = 1 << 26
"""A longer entry is reported as damaged."""
_WHITESPACE = " \t\n\r"
_DELIMITERS = frozenset(_WHITESPACE + ",]")
"""Characters that may follow an entry."""


def find_lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, end) byte offsets of the lines that are not empty.

    Raises:
        ValueError: the file is not UTF-8.
    """
    end = _skip_bom(file)
    for line in file:
        start, end = end, end + len(line)
        if line.strip():
            yield start, end


def find_items(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, end) byte offsets of the items of the list in the file.

    Raises:
        ValueError: the file is not JSON, not a list, or not UTF-8.
    """
    text = _Window(file, _skip_bom(file))
    first = text.next_char()
    if first != "[":
        raise ValueError(
            f"begins with {first!r}, expected '[': a list of entries. Use the suffix .jsonl for one entry per line."
            if first
            else "has no entry"
        )
    char = text.next_char(peek=True)
    if char == "]":
        text.next_char()
    while char != "]":
        yield text.next_value()
        char = text.next_char()
        if char not in ("]", ","):
            raise text.error("',' or ']' is missing after an entry")
    if text.next_char():
        raise text.error("extra data after the list")


class _Window:
    """A sliding window over the file.

    Bytes are decoded as Latin-1, where a character is one byte, so that text offsets are file offsets. The structural
    characters of JSON are ASCII, which is the same in UTF-8 and in Latin-1.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self._text, self._pos = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def next_char(self, peek: bool = False) -> str:
        """The next non-whitespace character, or "" at the end of the file. It is consumed unless `peek`."""
        while True:
            while self._pos < len(self._text):
                character = self._text[self._pos]
                if character not in _WHITESPACE:
                    self._pos += not peek
                    return character
                self._pos += 1
            if not self._extend():
                return ""

    def next_value(self) -> tuple[int, int]:
        """(start, end) byte offsets of the next value, which is consumed."""
        self.next_char(peek=True)
        while True:
            try:
                _, end = self._decode(self._text, self._pos)
            except json.JSONDecodeError as error:
                if len(self._text) - self._pos > MAX_ENTRY_BYTES or not self._extend():
                    self._pos = error.pos
                    raise self.error(error.msg) from error
            else:
                # a number at the end of the window may continue in the next block
                if self._text[end : end + 1] in _DELIMITERS or not self._extend():
                    offsets = self._start + self._pos, self._start + end
                    self._pos = end
                    return offsets

    def error(self, what: str) -> ValueError:
        return ValueError(f"is not JSON: {what}, at byte {self._start + self._pos}")

    def _extend(self) -> bool:
        """Read another block and drop what was consumed. Returns False at the end of the file."""
        kept = self._text[self._pos :]
        read = self._file.read(max(_BLOCK, len(kept)))
        if read:
            self._start, self._pos, self._text = self._start + self._pos, 0, kept + read.decode("latin-1")
        return bool(read)


def _skip_bom(file: BinaryIO) -> int:
    """Skip a byte-order mark. Returns its length."""
    first = file.read(4)
    encoding = json.detect_encoding(first)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"is encoded in {encoding}: save it as utf-8")
    return file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
