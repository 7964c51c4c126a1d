"""Exported and imported tokenizers give the ids of training in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.tokenizer import export_tokenizer, import_tokenizer
from megatron_vlm.config import LanguageConfig, ModelConfig
from megatron_vlm.data.processing.chat_template import INSTELLA
from megatron_vlm.data.processing.conversation import Turn, encode_prompt
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from tests.support.real_tokenizer import real_tokenizer_folder

TEXTS = ("Is there a red circle?\n", "Describe  this image in detail.", "ünïcödé 日本 12345", " a\n\nb ")
_CORPUS = (
    "what is the colour of the circle in this image",
    "<|user|>",
    "<|assistant|>",
    "describe this image in detail please",
    "is there a red rectangle yes no blue green",
)


def _sentencepiece_model(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(f"{line} {n}" for n in range(60) for line in _CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return folder / "tokenizer.model"


def _model_of(tokenizer: Tokenizer) -> ModelConfig:
    vocab_size = len(tokenizer)
    return ModelConfig(language=LanguageConfig(vocab_size=vocab_size + 10), image_token_index=vocab_size)


def _assert_same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    export_tokenizer(tokenizer, _model_of(tokenizer), folder)
    stock = AutoTokenizer.from_pretrained(folder)
    assert len(stock) == len(tokenizer) + 1
    assert stock.convert_tokens_to_ids("<image>") == len(tokenizer)
    assert (stock.eos_token_id, stock.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    for text in TEXTS:
        ids = stock(text)["input_ids"]
        assert ids == tokenizer.encode(text), text
        if stock.convert_tokens_to_ids("<unk>") not in ids:  # each library decodes the unknown token differently
            assert stock.decode([*ids, stock.eos_token_id], skip_special_tokens=True) == tokenizer.decode(ids), text
    turns = [Turn("human", "<image>\nIs there a red circle?")]
    prompt = stock.apply_chat_template(
        [{"role": "user", "content": turns[0].text}],
        chat_template=INSTELLA,
        add_generation_prompt=True,
        return_dict=True,
    )
    assert prompt["input_ids"] == encode_prompt(turns, tokenizer, [1], len(tokenizer)).ids.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "vocab_size": 120},
        {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"},
        {
            "model_type": "unigram",
            "vocab_size": 400,
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
        },
    ],
    ids=["unigram", "bpe with bytes", "unigram as is"],
)
def test_sentencepiece_model_exports_with_its_ids(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = _sentencepiece_model(tmp_path / "tokenizer", **settings)
    tokenizer = import_tokenizer(source, tmp_path / "imported")
    assert tokenizer.fingerprint == load_tokenizer(source).fingerprint
    (tmp_path / "exported").mkdir()
    _assert_same_ids(tokenizer, tmp_path / "exported")


def test_byte_level_tokenizer_exports_with_its_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "exported").mkdir()
    _assert_same_ids(load_tokenizer(tmp_path / "tokenizer"), tmp_path / "exported")
    back = import_tokenizer(tmp_path / "exported", tmp_path / "back")
    assert back.fingerprint == load_tokenizer(tmp_path / "tokenizer").fingerprint


def test_published_tokenizer_exports_with_its_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder())
    _assert_same_ids(tokenizer, tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.convert_tokens_to_ids("<image>") == 50280
    text = "|||IP_ADDRESS|||<|user|>\n<image>\nDescribe this image.\n<|assistant|>\n"
    golden = "50279 29 93 4537 49651 187 50280 187 4476 19268 436 2460 15 187 29 93 515 5567 49651 187"
    assert stock(text)["input_ids"] == [int(number) for number in golden.split()]


def test_image_token_must_be_the_next_id(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = _model_of(tokenizer)
    model.image_token_index += 1
    with pytest.raises(ConversionError, match=r"image_token_index of this checkpoint is 271.*has 270 tokens"):
        export_tokenizer(tokenizer, model, tmp_path)
