"""A plain transformers training loop: LlavaNext with a CLIP tower and an OLMo decoder, batches padded on the right.

It uses SDPA, the fused AdamW and no KV cache, and batches are collated before timing starts. Under bf16 it uses
autocast with fp32 weights, as transformers' Trainer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    OlmoConfig,
)

from benchmarks.support.samples import PAD, Sample
from checkpoint_convert.mapping.hf_names import canonical_name
from checkpoint_convert.mapping.param_map import param_map, to_megatron
from checkpoint_convert.megatron.files import tensors_of
from megatron_vlm.config import Recipe
from megatron_vlm.data.processing.tiling import CLIP_MEAN, CLIP_STD, normalise_tiles
from megatron_vlm.data.rows.batch import IGNORE_INDEX
from megatron_vlm.model.vlm import VisionLanguageModel

Batch = dict[str, Any]
"""Arguments of the model: tensors, and numbers for its attention kernel."""


def build(recipe: Recipe) -> LlavaNextForConditionalGeneration:
    """The recipe's model, randomly initialised."""
    model, vision, language = recipe.model, recipe.model.vision, recipe.model.language
    vision_config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
    )
    text_config = OlmoConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_hidden_layers,
        num_attention_heads=language.num_attention_heads,
        max_position_embeddings=language.max_position_embeddings,
        tie_word_embeddings=language.tie_word_embeddings,
        pad_token_id=PAD,
    )
    config = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=model.image_token_index,
        image_grid_pinpoints=[[height, width] for width, height in model.image_grid_pinpoints],
        vision_feature_layer=vision.vision_feature_layer,
        tie_word_embeddings=language.tie_word_embeddings,
    )
    return LlavaNextForConditionalGeneration(config).train()


def copy_weights(weights: torch.nn.Module, model: VisionLanguageModel, recipe: Recipe) -> None:
    """Copy the weights of a transformers model that `build` made into ours, on one rank."""
    state = weights.state_dict().items()
    tensors = {ours: tensor for name, tensor in state if (ours := canonical_name(name, "llava"))}
    tensors.pop("language_model.lm_head.weight")  # tied
    parameters = tensors_of(model)
    with torch.no_grad():
        for name, tensor in to_megatron(param_map(recipe.model), tensors, "transformers"):
            parameters[name].copy_(tensor)


def collate(samples: list[Sample], device: torch.device) -> Batch:
    """Right-padded batch of samples, in the format of transformers' processor and collator."""
    ids = [torch.from_numpy(sample.document.encoded.ids) for sample in samples]
    labels = [torch.from_numpy(sample.document.encoded.labels) for sample in samples]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        **images_of(samples),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def images_of(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """`pixel_values` [images, tiles, 3, size, size] and `image_sizes` [images, 2]; nothing if there are no images."""
    sizes = [size for sample in samples for size in sample.document.image_sizes]
    images = [image for sample in samples for image in sample.tiles.split(sample.tile_counts)]
    if not images:
        return {}
    tiles = [normalise_tiles(image, CLIP_MEAN, CLIP_STD) for image in images]
    return {
        "pixel_values": pad_sequence(tiles, batch_first=True),  # to the largest tile count of an image
        "image_sizes": torch.tensor([[height, width] for width, height in sizes]),
    }


def micro_batches(
    samples: list[Sample], size: int, device: torch.device, collate: Callable[..., Batch] = collate
) -> list[Batch]:
    """Split a step's samples, in their order, into micro-batches of `size`."""
    return [collate(samples[start : start + size], device) for start in range(0, len(samples), size)]


def padded_tokens(batches: list[Batch]) -> int:
    """Tokens that the model processes, padding included."""
    return sum(batch["input_ids"].numel() for batch in batches)


class Loop:
    """Training loop of a transformers model with the recipe's optimizer settings."""

    def __init__(self, model: LlavaNextForConditionalGeneration, recipe: Recipe) -> None:
        training = recipe.training
        self.model, self.clip = model, training.clip_grad
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=training.bf16)
        if training.recompute_granularity == "full":
            model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )

    def forward_backward(self, batches: list[Batch]) -> float:
        """Accumulate gradients of the mean loss over the step's supervised tokens; returns that mean."""
        count = torch.stack([(batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches]).sum()
        total = torch.zeros((), device=self.model.device)
        for batch in batches:
            with self.autocast:
                loss = self.loss(batch, count)
            loss.backward()
            total += loss.detach()
        return float(total)

    def loss(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """Sum over the batch's supervised tokens, divided by the step's `count` of them; a scalar."""
        outputs: Any = self.model(**batch, use_cache=False, num_items_in_batch=count)
        loss: torch.Tensor = outputs.loss
        return loss

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step."""
        loss = self.forward_backward(batches)
        clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss
