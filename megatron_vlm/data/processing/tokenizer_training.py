"""Trains small byte-level BPE tokenizers, for models with random weights. Imports tokenizers when it is called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, first: Sequence[str], last: Sequence[str], normalizer: Any = None
) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens that can write every byte.

    Args:
        texts: to train on.
        vocab_size: with all special tokens. Fewer tokens if the texts have not enough pairs to merge.
        first: special tokens that have the first ids.
        last: special tokens that have the last ids. They are found in normalized text if there is a normalizer.
        normalizer: of `tokenizers.normalizers`, applied to all text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(last),
        special_tokens=list(first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    normalized = normalizer is not None
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=normalized) for text in last])
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, *, eos: str, pad: str, **settings: Any) -> None:
    """Write a folder for `AutoTokenizer.from_pretrained`, with further `settings` of tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
