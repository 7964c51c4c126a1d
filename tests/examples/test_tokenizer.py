"""The demo's tokenizer has the special tokens of the published one."""

from __future__ import annotations

from pathlib import Path

import tokenizer as demo_tokenizer
from transformers import AutoTokenizer

from megatron_vlm.data.processing.tokenizer import load_tokenizer


def test_special_tokens(trained_tokenizer: Path) -> None:
    stock, ours = AutoTokenizer.from_pretrained(trained_tokenizer), load_tokenizer(trained_tokenizer)
    assert stock.convert_tokens_to_ids("<|endoftext|>") == 0
    assert (stock.pad_token, stock.pad_token_id, ours.pad_id) == ("<|padding|>", 1, 1)
    last = len(stock) - 1
    assert (stock.eos_token, stock.eos_token_id, ours.eos_id) == ("|||IP_ADDRESS|||", last, last)
    assert stock.convert_tokens_to_ids("|||EMAIL_ADDRESS|||") == last - 2
    assert len(ours) == len(stock)


def test_text_round_trips_and_roles_are_plain_text(trained_tokenizer: Path) -> None:
    stock, ours = AutoTokenizer.from_pretrained(trained_tokenizer), load_tokenizer(trained_tokenizer)
    text = "<|user|>\nis there not a gray rectangle in the image? é\n<|assistant|>\n"
    assert ours.decode(ours.encode(text)) == text
    assert stock(text)["input_ids"] == ours.encode(text)
    assert min(ours.encode(text)) > 1 and max(ours.encode(text)) < ours.eos_id - 2


def test_answer_words_are_single_tokens(trained_tokenizer: Path) -> None:
    ours = load_tokenizer(trained_tokenizer)
    for word in ("yes", "no", "circle", "rectangle", "triangle", "black", "teal"):
        assert len(ours.encode(word)) == 1, word


def test_training_on_one_sentence(tmp_path: Path) -> None:
    small = demo_tokenizer.train(iter(["is there a circle?"]))
    assert small.token_to_id("<|endoftext|>") == 0
    assert small.token_to_id("|||IP_ADDRESS|||") == small.get_vocab_size() - 1
