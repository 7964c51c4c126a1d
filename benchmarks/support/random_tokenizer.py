"""Write a small byte-level BPE tokenizer with Instella-VL's special tokens, for benchmarks and tests."""

from __future__ import annotations

from pathlib import Path

from megatron_vlm.data.processing.tokenizer_training import save_tokenizer, train_tokenizer

EOS, PAD = "|||IP_ADDRESS|||", "<|padding|>"
_SENTENCES = (
    "What is the colour of the circle in this image?",
    "Describe this image.",
    "A red dog. A blue dog. Is there a dog in the image? yes, no, yes",
)


def write_tokenizer(folder: Path, vocab_size: int = 270) -> int:
    """Write a Hugging Face tokenizer folder; returns the vocabulary size. The end-of-sequence token has the last id."""
    tokenizer = train_tokenizer(_SENTENCES, vocab_size, first=["<|endoftext|>", PAD], last=[EOS])
    save_tokenizer(tokenizer, folder, eos=EOS, pad=PAD)
    assert tokenizer.get_vocab_size() == vocab_size
    return vocab_size
