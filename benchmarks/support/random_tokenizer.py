"""Write a small byte-level BPE tokenizer with Instella-VL's special tokens, for benchmarks and tests."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS, PAD = "|||IP_ADDRESS|||", "<|padding|>"
_SENTENCES = (
    "What is the colour of the circle in this image?",
    "Describe this image.",
    "A red dog. A blue dog. Is there a dog in the image? yes, no, yes",
)


def write_tokenizer(folder: Path, vocab_size: int = 270) -> int:
    """Write a Hugging Face tokenizer folder; returns the vocabulary size. The end-of-sequence token has the last id."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", PAD], show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.get_vocab_size() == vocab_size
    return vocab_size
