"""Sizes of small models that `init --from-scratch` trains from random weights, and their tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.data.processing.tokenizer_training import save_tokenizer, train_tokenizer

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
_ROLES = "<|user|>\n<|assistant|>\n"
"""Plain text to the tokenizer, in every conversation of the `instella` template."""
_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Size:
    """Vision tower and decoder of the same width; each image is a base view and one tile, both square."""

    width: int
    heads: int
    vision_layers: int
    language_layers: int
    image_size: int
    """Side of the tile, pixels."""
    patch_size: int
    max_vocab_size: int
    lr: float


SIZES = {
    "tiny": Size(
        width=64, heads=4, vision_layers=4, language_layers=2, image_size=32, patch_size=8, max_vocab_size=512, lr=2e-3
    ),
    "small": Size(
        width=256,
        heads=8,
        vision_layers=7,
        language_layers=6,
        image_size=96,
        patch_size=8,
        max_vocab_size=4096,
        lr=5e-4,
    ),
}


def model_of(size: Size, vocab_size: int, context: int) -> ModelConfig:
    """A model of a size.

    Args:
        size: of the model.
        vocab_size: tokens of its tokenizer. The next id is the image token.
        context: tokens of the longest sample.
    """
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.heads,
            image_size=size.image_size,
            patch_size=size.patch_size,
        ),
        language=LanguageConfig(
            hidden_size=size.width,
            intermediate_size=math.ceil(8 * size.width / 3 / 32) * 32,  # as many parameters as an MLP of 4 x width
            num_hidden_layers=size.language_layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            vocab_size=math.ceil((vocab_size + 1) / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
            max_position_embeddings=context,
        ),
        image_token_index=vocab_size,
        image_grid_pinpoints=[[size.image_size, size.image_size]],
    )


def write_tokenizer(texts: Iterable[str], max_vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE tokenizer on the texts of the data, and write its folder. Returns its number of tokens."""
    roles = (_ROLES + text for text in texts)
    tokenizer = train_tokenizer(roles, max_vocab_size, first=[PADDING], last=[END_OF_TEXT])
    save_tokenizer(tokenizer, folder, eos=END_OF_TEXT, pad=PADDING)
    return int(tokenizer.get_vocab_size())
