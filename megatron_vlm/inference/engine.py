"""Text generation from a Megatron checkpoint, without conversion to Hugging Face.

    prompts and images -> one packed row -> logits of the prompts' last tokens -> a token per prompt -> next row -> ...

Prefill processes all prompts as one packed row, as in training. Each decoding step then adds one token per prompt, with
a key/value cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from megatron_vlm.config import ModelConfig, ParallelConfig
from megatron_vlm.data.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.data.processing.conversation import encode_prompt
from megatron_vlm.data.processing.image_tokens import RowFeatures, num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.inference.kv_cache import KVCache
from megatron_vlm.inference.request import Prompt
from megatron_vlm.inference.sampling import greedy
from megatron_vlm.model.build import build_model
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint


class GenerationEngine:
    """Generates answers to batches of prompts with an unsharded model."""

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.recipe = model.recipe

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """The text of each answer, without special tokens; arguments and errors as in `generate`."""
        return [self.tokenizer.decode(ids) for ids in self.generate(prompts, max_new_tokens)]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding.

        Args:
            prompts: one batch; each answer is the same as with a batch of one.
            max_new_tokens: generation stops here if no end-of-sequence token came before.

        Returns:
            New token ids of each prompt, including the end-of-sequence id if there is one.

        Raises:
            ValueError: a prompt does not end with a question, or has not as many placeholders as images.
        """
        if not prompts or max_new_tokens < 1:
            return [[] for _ in prompts]
        batch = read_prompts(prompts, self.recipe.model, self.recipe.data.image_aspect_ratio, self.tokenizer)
        lengths = np.diff(batch.cu_seqlens).tolist()
        cache, device = KVCache(lengths, max_new_tokens), current_device()
        language = self.model.language_model
        hidden = self.model(batch, cache)
        last = torch.tensor(batch.cu_seqlens[1:], device=device) - 1
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        while True:
            next_tokens = greedy(language.logits(hidden, last))
            for number, token in enumerate(next_tokens.tolist()):
                if number in unfinished:
                    answers[number].append(token)
                    if token == self.tokenizer.eos_id or len(answers[number]) == max_new_tokens:
                        unfinished.discard(number)
            if not unfinished:
                return answers
            cache.advance(device)
            assert cache.lengths is not None
            row = _row_of_single_tokens(next_tokens.cpu(), cache.lengths.cpu())
            # Without model.embed, which would run the vision tower on a zero tile.
            embedded = language.embed(row.tokens.to(device))
            hidden = language.decode(embedded, self.model.packed_sequence(row, cache))
            last = torch.arange(len(prompts), device=device)


def read_prompts(prompts: Sequence[Prompt], model: ModelConfig, aspect_ratio: str, tokenizer: Tokenizer) -> PackedBatch:
    """The prompts as one packed row, a document each. Raises ValueError like `encode_prompt`, naming the prompt."""
    ids, positions, cu_seqlens = [], [], [0]
    tiles = []
    geometry = ImageGeometry.of(model, aspect_ratio)
    features = RowFeatures(geometry)
    for number, prompt in enumerate(prompts):
        lengths = [num_image_tokens(image.size, geometry) for image in prompt.images]
        try:
            encoded = encode_prompt(prompt.turns, tokenizer, lengths, model.image_token_index)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        for image, start in zip(prompt.images, encoded.image_starts, strict=True):
            tiles.append(extract_tiles(image, geometry))
            features.add(image.size, cu_seqlens[-1] + start)
        ids.append(encoded.ids)
        positions.append(np.arange(len(encoded.ids)))
        cu_seqlens.append(cu_seqlens[-1] + len(encoded.ids))
    tokens = torch.from_numpy(np.concatenate(ids))
    return PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        positions=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens=cu_seqlens,
        num_tiles=features.num_tiles,
        **features.fields(),
        tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else None,
        num_tokens=cu_seqlens[-1],
    )


def _row_of_single_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> PackedBatch:
    empty = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        positions=positions,
        cu_seqlens=list(range(len(tokens) + 1)),
        feature_positions=empty,
        feature_sources=empty,
        num_tiles=0,
        num_tokens=len(tokens),
    )


@contextmanager
def load_engine(folder: str | Path) -> Iterator[GenerationEngine]:
    """An engine for the newest checkpoint in `folder`, with the tokenizer saved there; usable inside the block.

    Raises:
        CheckpointError: there is no finished checkpoint.
        DataError: the folder has no tokenizer.
    """
    checkpoint, recipe = require_checkpoint(folder), read_recipe(folder)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    recipe.parallel = ParallelConfig()
    with distributed(recipe.parallel):
        chunks = build_model(recipe)
        load_checkpoint(checkpoint, chunks, recipe, tokenizer_fingerprint=tokenizer.fingerprint)
        yield GenerationEngine(chunks[0], tokenizer)
