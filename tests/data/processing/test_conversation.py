"""Ids and labels equal those of the published model and tokenizer; each rule of the template by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.processing.conversation import (
    IGNORE_INDEX,
    EncodedConversation,
    Turn,
    encode_conversation,
    encode_prompt,
    move_image_first,
)
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from tests.data.helpers import tiny_sentencepiece
from tests.support.real_tokenizer import real_tokenizer_folder

IMAGE = 50280
QUESTION = [29, 93, 4537, 49651, 187]  # <|user|>\n
ANSWER = [29, 93, 515, 5567, 49651, 187]  # <|assistant|>\n
FIRST = [50279, *QUESTION, -200, 187, 1276, 310, 352, 32, 187, *ANSWER, 34, 4370, 15, 50279, 187]
SECOND = [*QUESTION, 2973, 454, 32, 187, *ANSWER, 27543, 50279, 187]
TURNS = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A dog.")]


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return load_tokenizer(real_tokenizer_folder())


def collapsed(encoded: EncodedConversation) -> tuple[list[int], list[int]]:
    """Ids and labels, with the tokens of each image collapsed to one -200."""
    keep = np.ones(len(encoded.ids), bool)
    keep[1:] = (encoded.ids[1:] != IMAGE) | (encoded.ids[:-1] != IMAGE)
    ids = np.where(encoded.ids == IMAGE, -200, encoded.ids)
    return ids[keep].tolist(), encoded.labels[keep].tolist()


def test_golden_ids_and_labels(real: Tokenizer) -> None:
    encoded = encode_conversation(TURNS, real, [7], IMAGE)
    ids, labels = collapsed(encoded)
    assert ids == FIRST
    assert labels == [IGNORE_INDEX] * 19 + [34, 4370, 15, 50279, 187]
    assert encoded.image_starts == [6] and (encoded.ids == IMAGE).sum() == 7
    assert encoded.ids.dtype == encoded.labels.dtype == np.int64


def test_golden_second_turn(real: Tokenizer) -> None:
    turns = [*TURNS, Turn("human", "Colour?"), Turn("gpt", "Brown")]
    ids, labels = collapsed(encode_conversation(turns, real, [3], IMAGE))
    assert ids == FIRST + SECOND
    assert labels[24:] == [IGNORE_INDEX] * (len(SECOND) - 3) + [27543, 50279, 187]


def test_golden_prompt(real: Tokenizer) -> None:
    ids, labels = collapsed(encode_prompt([Turn("human", "<image>\nDescribe this image.")], real, [576], IMAGE))
    assert ids == [50279, *QUESTION, -200, 187, 4476, 19268, 436, 2460, 15, 187, *ANSWER]
    assert set(labels) == {IGNORE_INDEX}


def test_a_prompt_is_a_prefix_of_the_conversation(real: Tokenizer) -> None:
    turns = [*TURNS, Turn("human", "  odd\n\nspaces \n"), Turn("gpt", "Brown")]
    prompt, whole = encode_prompt(turns[:3], real, [3], IMAGE), encode_conversation(turns, real, [3], IMAGE)
    np.testing.assert_array_equal(prompt.ids, whole.ids[: len(prompt.ids)])


def test_tokenizing_turn_by_turn_equals_tokenizing_the_whole_text(real: Tokenizer) -> None:
    """In a conversation without images and special strings."""
    turns = [Turn("human", " How\n\n many? "), Turn("gpt", "\n Two,\n or so. \n"), Turn("human", ""), Turn("gpt", "3")]
    text = "<|user|>\n How\n\n many? \n<|assistant|>\nTwo,\n or so.", "\n<|user|>\n\n<|assistant|>\n3", "\n"
    expected = [50279, *real.encode(text[0]), 50279, *real.encode(text[1]), 50279, *real.encode(text[2])]
    assert encode_conversation(turns, real, [], IMAGE).ids.tolist() == expected


def test_only_answers_are_supervised(real: Tokenizer) -> None:
    turns = [Turn("human", "<image><image>\nAnd |||IP_ADDRESS|||?"), Turn("gpt", " yes |||IP_ADDRESS||| ")]
    encoded = encode_conversation(turns, real, [2, 3], IMAGE)
    supervised = encoded.labels != IGNORE_INDEX
    np.testing.assert_array_equal(encoded.labels[supervised], encoded.ids[supervised])
    assert not (supervised & (encoded.ids == IMAGE)).any()
    assert (encoded.ids == 50279).sum() == 2  # at the start and after the answer; none from text
    assert real.decode(encoded.ids[supervised]) == "yes |||IP_ADDRESS|||\n"
    assert encoded.image_starts == [6, 8] and (encoded.ids == IMAGE).sum() == 5


def test_a_system_turn(real: Tokenizer) -> None:
    encoded = encode_conversation([Turn("system", "Be brief."), *TURNS], real, [7], IMAGE)
    system = real.encode("<|system|>\nBe brief.\n")
    ids, labels = collapsed(encoded)
    assert ids == [FIRST[0], *system, *FIRST[1:]]
    assert labels[: len(system) + 19] == [IGNORE_INDEX] * (len(system) + 19)


def test_sentencepiece_ids_and_labels(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece(tmp_path / "t.model"))
    image, eos = len(tokenizer), tokenizer.eos_id
    encoded = encode_conversation(TURNS, tokenizer, [4], image)
    newline, answer = tokenizer.encode("\n"), tokenizer.encode("A dog.")
    start = encoded.image_starts[0]
    ids = encoded.ids.tolist()
    assert ids[:start] == [eos, *tokenizer.encode("<|user|>\n")]
    assert ids[start : start + 4] == [image] * 4
    assert ids[start + 4 :] == [*tokenizer.encode("\nWhat is it?\n<|assistant|>\n"), *answer, eos, *newline]
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == [*answer, eos, *newline]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("Look <image> here ", "<image>\nLook  here"),
        ("<image>\n as it is ", "<image>\n as it is "),
        ("<image> a <image> b", "<image> a <image> b"),
        ("a <image> b <image>", "a <image> b <image>"),
        (" no image ", " no image "),
        (" <image>", "<image>"),
        ("Caption.QA_GT_caption_based_noisy", "Caption."),
    ],
)
def test_a_single_placeholder_is_moved_to_the_front(before: str, after: str) -> None:
    assert move_image_first(before) == after


@pytest.mark.parametrize(
    ("turns", "lengths", "message"),
    [
        (TURNS, [], "1 <image> placeholders for 0 images"),
        (TURNS, [3, 3], "1 <image> placeholders for 2 images"),
        ([Turn("human", "hi")], [], "not an answer"),
        ([Turn("tool", "hi"), Turn("gpt", "a")], [], "unknown role 'tool'"),
        ([], [], "at least one turn"),
    ],
)
def test_invalid_conversations_are_errors(real: Tokenizer, turns: list[Turn], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(turns, real, lengths, IMAGE)


def test_a_prompt_ends_with_a_question(real: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not a question"):
        encode_prompt(TURNS, real, [3], IMAGE)
