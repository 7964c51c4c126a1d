"""Text token by token is the text of all tokens, up to the first stop word."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.support.random_tokenizer import write_tokenizer
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.inference.detokenizer import Detokenizer

TEXT = "Is there a dog? – ja, größer: 犬 🐕 and a cat. STOP it!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def _stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer, texts = Detokenizer(tokenizer, stop), []
    for token in ids:
        text, stopped = detokenizer.add(token)
        texts.append(text)
        if stopped:
            return texts, True
    return [*texts, detokenizer.finish()], False


def test_texts_concatenate_to_the_text(tokenizer: Tokenizer) -> None:
    texts, stopped = _stream(tokenizer, [*tokenizer.encode(TEXT), tokenizer.eos_id, tokenizer.pad_id])
    assert "".join(texts) == TEXT
    assert not stopped
    assert not any("\ufffd" in text for text in texts)
    assert sum(bool(text) for text in texts) > 20, "text must not be held back to the end"


def test_incomplete_characters_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a犬")[:-1]
    assert "".join(_stream(tokenizer, ids)[0]) == tokenizer.decode(ids) == "a\ufffd"


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(_stream(tokenizer, [*tokenizer.encode("ab"), len(tokenizer), len(tokenizer) + 7])[0]) == "ab"


def test_no_token_needs_the_whole_vocabulary(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dict of OLMo's vocabulary takes longer to make than a step of a small model."""

    class WithoutVocabulary:
        def __init__(self, fast: Any) -> None:
            self.decode = fast.decode

    ids = tokenizer.encode(TEXT)
    monkeypatch.setattr(tokenizer, "_fast", WithoutVocabulary(tokenizer._fast))  # type: ignore[attr-defined]
    assert "".join(_stream(tokenizer, ids)[0]) == TEXT


@pytest.mark.parametrize("stop", [("dog?",), ("STOP", "zzz"), ("cat. S", "cat"), ("größer",), ("!",)])
def test_text_ends_before_the_first_stop_word(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    texts, stopped = _stream(tokenizer, tokenizer.encode(TEXT), stop)
    assert stopped
    assert "".join(texts) == TEXT[: min(TEXT.find(word) for word in stop if word in TEXT)]


def test_text_that_could_begin_a_stop_word_is_held_back_until_it_is_none(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("abcd",))
    texts = [detokenizer.add(token)[0] for letter in "xabcabz" for token in tokenizer.encode(letter)]
    assert texts == ["x", "", "", "", "abc", "", "abz"]
    texts = [detokenizer.add(token)[0] for letter in "ab" for token in tokenizer.encode(letter)]
    assert texts == ["", ""]
    assert detokenizer.finish() == "ab"


def test_random_bytes_lose_nothing(tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    for _ in range(50):
        ids = [chance.randrange(2, len(tokenizer) - 1) for _ in range(30)]
        text = "".join(_stream(tokenizer, ids, ("never found",))[0])
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")
