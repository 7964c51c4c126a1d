"""Token ids to text, token by token, up to the first stop word."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlm.data.processing.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""What a tokenizer decodes incomplete UTF-8 to."""


class Detokenizer:
    """Text of one answer. Concatenated, the returned texts are the text of all tokens, up to the stop word.

    The last tokens are decoded together with those before them, because a token's text depends on them (spaces in
    sentencepiece, characters of several tokens). Text that could begin a stop word is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        """`context` are the last tokens of a text that the answer continues."""
        self._tokenizer, self._stop = tokenizer, stop
        self._special = {tokenizer.eos_id, tokenizer.pad_id}
        self._ids = [token for token in context if self._has_text(token)]
        self._window, self._decoded = 0, len(self._ids)
        """The ids from `window` on are decoded together; those before `decoded` have been returned or held back."""
        self._held = ""

    def _has_text(self, token: int) -> bool:
        return token not in self._special and token < len(self._tokenizer)

    def add(self, token: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop word was found); a stop word ends the text."""
        if not self._has_text(token):
            return "", False
        self._ids.append(token)
        text = self._undecoded()
        if text.endswith(_REPLACEMENT):
            return "", False
        return self._without_stop_word(text)

    def finish(self) -> str:
        """The text that was held back, when no further token follows."""
        text, stopped = self._without_stop_word(self._undecoded())
        if stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _undecoded(self) -> str:
        before = self._tokenizer.decode(self._ids[self._window : self._decoded], skip_special_tokens=False)
        return self._tokenizer.decode(self._ids[self._window :], skip_special_tokens=False)[len(before) :]

    def _without_stop_word(self, text: str) -> tuple[str, bool]:
        self._window, self._decoded = self._decoded, len(self._ids)
        text = self._held + text
        found = [position for word in self._stop if (position := text.find(word)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, word: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
