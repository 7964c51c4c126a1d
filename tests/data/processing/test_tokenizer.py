"""Ids of Hugging Face and sentencepiece tokenizers; special strings in text are encoded as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.data.helpers import EOS, tiny_sentencepiece, tiny_tokenizer_folder
from tests.support.real_tokenizer import real_tokenizer_folder


def test_real_tokenizer_has_the_published_special_ids() -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder())
    assert (tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)) == (50279, 1, 50280)
    assert tokenizer.encode("A dog.") == [34, 4370, 15]
    assert tokenizer.encode("\n") == [187]
    assert tokenizer.decode([34, 4370, 15, 50279]) == "A dog."
    assert tokenizer.decode([34, 50279], skip_special_tokens=False) == "A" + EOS


@pytest.mark.parametrize("text", ["|||IP_ADDRESS|||", "<|padding|>", "<|endoftext|>", "a|||IP_ADDRESS|||b"])
def test_special_strings_in_text_are_text(text: str) -> None:
    tokenizer = load_tokenizer(real_tokenizer_folder())
    ids = tokenizer.encode(text)
    assert len(ids) > 2 and not {0, 1, 50279} & set(ids)
    assert tokenizer.decode(ids) == text


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece(tmp_path / "t.model"))
    ids = tokenizer.encode("red circle </s>")
    assert tokenizer.eos_id not in ids and tokenizer.decode([*ids, tokenizer.eos_id]) == "red circle </s>"
    assert tokenizer.pad_id == tokenizer.eos_id  # the model has no padding piece
    assert max(ids) < len(tokenizer)


def test_the_fingerprint_changes_with_the_ids(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path / "a")
    before = load_tokenizer(folder).fingerprint
    assert load_tokenizer(tiny_tokenizer_folder(tmp_path / "b")).fingerprint == before
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
    assert load_tokenizer(folder).fingerprint != before


def test_errors_of_missing_and_invalid_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"neither tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="set tokenizer_model"):
        load_tokenizer("")
    folder = tiny_tokenizer_folder(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no eos_token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nowhere"}))
    with pytest.raises(DataError, match="'nowhere' is not in"):
        load_tokenizer(folder)
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
