"""Prompts to token ids and tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, encode_conversation, encode_prompt
from megatron_vlm.data.processing.image_tokens import RowFeatures, num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, extract_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.inference.request import AnsweredPrompt, AnyPrompt, Prompt, TextPrompt, TokenPrompt

_CONTEXT_TOKENS = 8


@dataclass
class PromptImage:
    """An image of a prompt and its tokens."""

    start: int
    """Position of its first image token in the prompt."""
    length: int
    tiles: np.ndarray
    """[t, 3, side, side] uint8"""
    size: Size
    """(width, height)"""
    num_images: int
    """Images of the prompt, which decide how each is tiled."""
    digest: bytes
    """Hash of tiles, size and length: images with the same digest have the same features."""


@dataclass
class EncodedPrompt:
    """Token ids of a prompt, image tokens included, and its images."""

    ids: list[int]
    images: list[PromptImage] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    """Last text tokens of a prompt that the answer continues: the answer's first space depends on them."""


def encode(prompt: AnyPrompt, tokenizer: Tokenizer, geometry: ImageGeometry, model: ModelConfig) -> EncodedPrompt:
    """Encode any kind of prompt.

    Raises:
        ValueError: no token, placeholders and images differ in number, a conversation does not end with a question (an
            AnsweredPrompt: with an answer), or a token id is out of range.
    """
    if isinstance(prompt, TokenPrompt):
        ids = _checked_ids(prompt.token_ids, model)
        return EncodedPrompt(ids, context=ids[-_CONTEXT_TOKENS:])
    num_images = len(prompt.images)
    geometry = geometry.for_sample(num_images)
    lengths = [num_image_tokens(image.size, geometry) for image in prompt.images]
    context: list[int] = []
    if isinstance(prompt, AnsweredPrompt):
        encoded = encode_conversation(prompt.turns, tokenizer, lengths, model.image_token_index)
        ids, starts = encoded.ids.tolist(), encoded.image_starts
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_id)]  # without the end of the turn, a newline
    elif isinstance(prompt, Prompt):
        encoded = encode_prompt(prompt.turns, tokenizer, lengths, model.image_token_index)
        ids, starts = encoded.ids.tolist(), encoded.image_starts
    else:
        ids, starts = _encode_text(prompt, tokenizer, lengths, model.image_token_index)
        context = [token for token in ids[-_CONTEXT_TOKENS:] if token != model.image_token_index]
    images = [
        _prompt_image(start, length, extract_tiles(image, geometry), image.size, num_images)
        for start, length, image in zip(starts, lengths, prompt.images, strict=True)
    ]
    return EncodedPrompt(ids, images, context)


def _checked_ids(token_ids: Sequence[int], model: ModelConfig) -> list[int]:
    ids = [int(token) for token in token_ids]
    if not ids:
        raise ValueError("The prompt has no tokens.")
    for token in ids:
        if not 0 <= token < model.language.vocab_size:
            raise ValueError(f"Token id {token} of the prompt is not in 0..{model.language.vocab_size - 1}.")
        if token == model.image_token_index:
            raise ValueError(f"Token id {token} of the prompt stands for an image: give images with a text prompt.")
    return ids


def _encode_text(
    prompt: TextPrompt, tokenizer: Tokenizer, lengths: Sequence[int], image_token_index: int
) -> tuple[list[int], list[int]]:
    spans = prompt.text.split(IMAGE_PLACEHOLDER)
    if len(spans) - 1 != len(lengths):
        raise ValueError(
            f"{len(spans) - 1} {IMAGE_PLACEHOLDER} placeholders for {len(lengths)} images: every image needs one "
            "placeholder in the text"
        )
    ids, starts = [tokenizer.eos_id] if prompt.add_bos else [], []
    for number, span in enumerate(spans):
        if number:
            starts.append(len(ids))
            ids += [image_token_index] * lengths[number - 1]
        if span:
            ids += tokenizer.encode(span)
    if not ids:
        raise ValueError("The prompt is empty: give it text, or begin it with the end-of-sequence token (add_BOS).")
    return ids, starts


def _prompt_image(start: int, length: int, tiles: np.ndarray, size: Size, num_images: int) -> PromptImage:
    digest = hashlib.blake2b(repr((size, length)).encode(), digest_size=16)
    digest.update(tiles.tobytes())
    return PromptImage(start, length, tiles, size, num_images, digest.digest())


def read_prompts(
    prompts: Sequence[Prompt], model: ModelConfig, aspect_ratio: str, tokenizer: Tokenizer, multi_image: str = "same"
) -> PackedBatch:
    """The prompts as one packed row, a document each. Raises ValueError like `encode`, naming the prompt."""
    geometry = ImageGeometry.of(model, aspect_ratio, multi_image)
    features = RowFeatures(geometry)
    ids: list[int] = []
    cu_seqlens, tiles = [0], []
    for number, prompt in enumerate(prompts):
        try:
            encoded = encode(prompt, tokenizer, geometry, model)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        for image in encoded.images:
            tiles.append(image.tiles)
            features.add(image.size, len(ids) + image.start, image.num_images)
        ids += encoded.ids
        cu_seqlens.append(len(ids))
    tokens = torch.tensor(ids, dtype=torch.int64)
    return PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        positions=torch.cat(
            [torch.arange(end - start) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
        ),
        cu_seqlens=cu_seqlens,
        num_tiles=features.num_tiles,
        **features.fields(),
        tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else None,
        num_tokens=len(ids),
    )
