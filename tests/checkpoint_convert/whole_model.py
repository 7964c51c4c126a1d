"""Our model and transformers' with the same weights, and inputs of both for the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoint_convert.huggingface.config import model_from_llava_next
from checkpoint_convert.mapping.hf_names import canonical_name
from checkpoint_convert.mapping.param_map import param_map, to_megatron
from checkpoint_convert.megatron.files import tensors_of
from megatron_vlm.config import ModelConfig, Recipe
from megatron_vlm.data.processing.image_tokens import feature_order
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles, image_to_tiles
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch
from megatron_vlm.model.build import build_model
from megatron_vlm.model.image_merge import encode_tiles
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import distributed

SINGLE, TALL, WIDE = (20, 20), (25, 80), (90, 31)
"""(width, height) of images that become one tile, a column of tiles and a row of tiles."""


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(model: VisionLanguageModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the model; a name that the model lacks is a KeyError."""
    into = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors:
            into[name].copy_(tensor)


def canonical_tensors(hf_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a LlavaNextForConditionalGeneration under the parameter map's names."""
    tied = hf_model.config.text_config.tie_word_embeddings
    named = {canonical_name(name, "llava"): tensor for name, tensor in hf_model.state_dict().items()}
    return {
        name: tensor
        for name, tensor in named.items()
        if name is not None and not (tied and name == "language_model.lm_head.weight")
    }


def model_config(hf_model: Any) -> ModelConfig:
    """Our config of the model, as hf_to_megatron reads it from config.json."""
    return model_from_llava_next(hf_model.config.to_dict(), "the reference")


@contextmanager
def megatron_model(hf_model: Any) -> Iterator[VisionLanguageModel]:
    """Our model with the weights of a LlavaNextForConditionalGeneration, in one process."""
    recipe = Recipe(model=model_config(hf_model))
    with distributed(recipe.parallel):
        (model,) = build_model(recipe)
        fill(model, to_megatron(param_map(recipe.model), canonical_tensors(hf_model), "the reference"))
        yield model.eval()


def prompt(model: ModelConfig, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[PackedBatch, dict[str, Any]]:
    """Random tokens around images of the given sizes: our row, and the inputs of transformers."""
    generator = np.random.default_rng(seed)
    images = [picture(size, seed + number) for number, size in enumerate(sizes)]
    per_tile = model.vision.patches_per_tile
    ids = [generator.integers(2, model.image_token_index, 5)]
    positions, sources, tiles, pixels = [], [], [], []
    for image in images:
        order = feature_order(image.size, ImageGeometry.of(model, "anyres"))
        positions.append(sum(map(len, ids)) + np.arange(len(order)))
        sources.append(np.where(order < 0, -1, order + per_tile * sum(map(len, tiles))))
        tiles.append(image_to_tiles(image, model, "anyres"))
        pixels.append(extract_tiles(image, ImageGeometry.of(model, "anyres")))
        ids += [np.full(len(order), model.image_token_index), generator.integers(2, model.image_token_index, 4)]
    tokens = torch.from_numpy(np.concatenate(ids))
    none = np.empty(0, dtype=np.int64)
    batch = PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        positions=torch.arange(len(tokens)),
        cu_seqlens=[0, len(tokens)],
        feature_positions=torch.from_numpy(np.concatenate([none, *positions])),
        feature_sources=torch.from_numpy(np.concatenate([none, *sources])),
        num_tiles=sum(map(len, tiles)),
        tiles=torch.from_numpy(np.concatenate(pixels)) if pixels else None,
        num_tokens=len(tokens),
    )
    inputs: dict[str, Any] = {"input_ids": tokens[None]}
    if tiles:
        most = max(map(len, tiles))
        padded = [np.pad(t, ((0, most - len(t)), (0, 0), (0, 0), (0, 0))) for t in tiles]
        inputs["pixel_values"] = torch.from_numpy(np.stack(padded))
        inputs["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
    return batch, inputs


@torch.no_grad()
def our_features(model: VisionLanguageModel, batch: PackedBatch) -> torch.Tensor:
    """Merged image features [N, H], in the order of their positions."""
    row = model.on_device(batch)
    features = encode_tiles(model.vision_model, model.projector, row, model.view, tower_is_frozen=False).flatten(0, 1)
    table = torch.cat([features, model.image_newline[None]])
    return table[batch.feature_sources]


@torch.no_grad()
def our_logits(model: VisionLanguageModel, batch: PackedBatch) -> torch.Tensor:
    """[S, V]"""
    hidden = model.language_model.decode(model.embed(batch), model.packed_sequence(batch))
    return model.language_model.logits(hidden, torch.arange(len(batch.tokens)))
