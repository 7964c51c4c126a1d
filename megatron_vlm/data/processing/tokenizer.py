"""Tokenizers: `tokenizer.json` of a Hugging Face folder, or a sentencepiece model."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.chat_template import INSTELLA, ChatTemplate, TemplateError, read_chat_template

AUTO, INSTELLA_NAME = "auto", "instella"
"""Values of the setting chat_template; others are files."""
PLACEHOLDERS = ("<image>", "<video>")
"""Tokens that transformers' processors replace by features. The loader inserts image_token_index itself."""


class Tokenizer(ABC):
    """The interface that data, checkpoints and inference use.

    Text never encodes to the end-of-sequence or padding id, even if it contains their strings: those ids are only added
    by number, so a user who types a special string cannot end a turn.
    """

    path: Path
    """The folder or file it was read from."""
    eos_id: int
    pad_id: int
    """The end-of-sequence id if the tokenizer has no padding token. Padding is never a target and never attended to."""
    fingerprint: str
    """sha256 in hex of what determines the ids: tokenizers with the same fingerprint encode text to the same ids."""

    chat_template: ChatTemplate | None = None
    """How conversations become text; None: the `instella` template (conversation.py)."""
    placeholder_ids: frozenset[int] = frozenset()
    """Ids of tokens that stand for images; text never encodes to them."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def __len__(self) -> int:
        """The largest id, special tokens included, plus 1."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Args:
            ids: token ids below `len(self)`.
            skip_special_tokens: omit the end-of-sequence and padding tokens from the text.
        """
        special = {self.eos_id, self.pad_id} if skip_special_tokens else set()
        return self._decode([int(i) for i in ids if int(i) not in special])


class HuggingFaceTokenizer(Tokenizer):
    """`tokenizer.json`, with the special tokens of `tokenizer_config.json` or `special_tokens_map.json`.

    A token `<image>` that an export added as the last one is left out, and a `<video>` token after it.
    """

    definition: bytes
    """tokenizer.json without these."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as FastTokenizer

        self.path = folder
        try:
            self.definition = without_placeholders((folder / "tokenizer.json").read_bytes())
            self._fast = FastTokenizer.from_str(self.definition.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{folder / 'tokenizer.json'} is not a tokenizer: {error}. Download the folder again."
            ) from error
        special = {name: self._special_text(name) for name in ("eos_token", "pad_token")}
        eos = special["eos_token"]
        if eos is None:
            raise DataError(
                f"tokenizer folder {folder} has no eos_token. Add it to tokenizer_config.json: it ends every answer."
            )
        self.eos_id = self._special_id("eos_token", eos)
        pad = special["pad_token"]
        self.pad_id = self.eos_id if pad is None else self._special_id("pad_token", pad)
        # Some tokenizers list their end-of-sequence string as an ordinary added token, which text could encode to.
        found = {name: self._fast.token_to_id(name) for name in PLACEHOLDERS}
        placeholders = {name: number for name, number in found.items() if number is not None}
        self.placeholder_ids = frozenset(placeholders.values())
        names = [name for name in (eos, pad, *placeholders) if name is not None]
        self._fast.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in names])
        self._fast.encode_special_tokens = True
        self._fast.no_truncation()
        self._fast.no_padding()
        # Not the number of tokens: ids may have gaps. Once: a dict of the vocabulary takes milliseconds, and generation
        # asks for each token.
        self._length = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.sha256(self.definition)
        digest.update(f"eos={self.eos_id} pad={self.pad_id}".encode())
        self.fingerprint = digest.hexdigest()

    def set_chat_template(self, text: str) -> None:
        """Encode conversations with a Jinja template. Raises DataError if it cannot be compiled."""
        from tokenizers import Tokenizer as FastTokenizer

        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        special = {name: value for name in names if (value := self._special_text(name)) is not None}
        try:
            self.chat_template = ChatTemplate(text, special, FastTokenizer.from_str(self.definition.decode("utf-8")))
        except TemplateError as error:
            raise DataError(f"the chat template of {self.path} cannot be used: {error}. Set chat_template.") from error

    def _special_text(self, name: str) -> str | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.path / file
            if not path.exists():
                continue
            try:
                value: Any = json.loads(path.read_text(encoding="utf-8")).get(name)
            except (json.JSONDecodeError, AttributeError) as error:
                raise DataError(f"{path} is not a JSON object: {error}. Download the folder again.") from error
            if isinstance(value, dict):
                value = value.get("content")
            if value is not None:
                return str(value)
        return None

    def _special_id(self, name: str, text: str) -> int:
        number = self._fast.token_to_id(text)
        if number is None:
            raise DataError(
                f"tokenizer folder {self.path}: {name} {text!r} is not in its tokenizer.json. Are these files of two "
                "tokenizers? Download the folder again."
            )
        return int(number)

    def encode(self, text: str) -> list[int]:
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=False))

    def __len__(self) -> int:
        return self._length


def without_placeholders(definition: bytes) -> bytes:
    """A tokenizer.json without an `<image>` token that is its last, and a `<video>` token after it.

    Raises ValueError if it is not JSON.
    """
    content = json.loads(definition)
    added = content.get("added_tokens") or []
    by_id = sorted(added, key=lambda token: token.get("id", -1))
    removed = []
    while by_id and by_id[-1].get("content") in PLACEHOLDERS:
        removed.append(by_id.pop())
    if PLACEHOLDERS[0] not in (token["content"] for token in removed):
        return definition
    content["added_tokens"] = [token for token in added if token not in removed]
    # As the tokenizers library writes it: adding a token and removing it again gives the same bytes.
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file."""

    def __init__(self, file: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise DataError(f"{file} needs the package sentencepiece. Run pip install sentencepiece.") from error
        self.path = file
        definition = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=definition)
        except RuntimeError as error:
            raise DataError(f"{file} is not a sentencepiece model: {error}. Copy it again.") from error
        if self._processor.eos_id() < 0:
            raise DataError(f"{file} has no end-of-sequence piece. Train it with an eos_id: it ends every answer.")
        self.eos_id = int(self._processor.eos_id())
        self.pad_id = int(self._processor.pad_id()) if self._processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def encode(self, text: str) -> list[int]:
        # sentencepiece never encodes text to control pieces.
        return [int(i) for i in self._processor.encode(text)]

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())


def load_tokenizer(path: str | Path, chat_template: str = AUTO) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a Hugging Face folder that holds tokenizer.json, or a sentencepiece .model file.
        chat_template: how conversations become text: `auto` (the folder's chat template, or else `instella`),
            `instella`, or a file with a Jinja template.

    Raises:
        DataError: `path` does not exist or is not a supported tokenizer, or the template cannot be used.
    """
    tokenizer = _load(path)
    text = chat_template_text(tokenizer.path, chat_template)
    if text != INSTELLA:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise DataError(
                f"chat_template {chat_template} needs a Hugging Face tokenizer folder, not {tokenizer.path}"
            )
        tokenizer.set_chat_template(text)
    return tokenizer


def chat_template_text(tokenizer: Path, chat_template: str) -> str:
    """The Jinja template that the setting chat_template means for a tokenizer.

    Raises:
        DataError: it is a file that cannot be read.
    """
    if chat_template == AUTO:
        return (read_chat_template(tokenizer) if tokenizer.is_dir() else None) or INSTELLA
    if chat_template == INSTELLA_NAME:
        return INSTELLA
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"chat_template {chat_template} is neither auto, instella nor a file: {error}"
        raise DataError(f"{what}. Set it to one of these.") from error


def _load(path: str | Path) -> Tokenizer:
    if not str(path):
        raise DataError(
            "no tokenizer: set tokenizer_model to a Hugging Face tokenizer folder or a sentencepiece .model file"
        )
    location = Path(path)
    if location.is_dir():
        if (location / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(location)
        models = sorted(location.glob("*.model"))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0])
        what = "neither tokenizer.json nor exactly one .model file"
        raise DataError(f"tokenizer folder {location} holds {what}. Give another, or download it again.")
    if location.is_file() and location.suffix == ".model":
        return SentencePieceTokenizer(location)
    raise DataError(
        f"no tokenizer at {location}. Set tokenizer_model to a Hugging Face tokenizer folder or a sentencepiece .model "
        "file."
    )
