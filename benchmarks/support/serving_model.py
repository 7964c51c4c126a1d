"""The model of the serving benchmark: randomly initialised, once as transformers has it and once as ours."""

from __future__ import annotations

import torch

from benchmarks.support import transformers_loop
from megatron_vlm.config import LanguageConfig, ModelConfig, Recipe, TrainingConfig, VisionConfig
from megatron_vlm.model.build import build_model
from megatron_vlm.model.vlm import VisionLanguageModel


def recipe_of(hidden_size: int, num_layers: int, vocab_size: int = 4096, bf16: bool = False) -> Recipe:
    """A language model with the real one's proportions; the vision tower is not used."""
    vision = VisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14,
        vision_feature_layer=-1,
    )  # fmt: skip
    heads = hidden_size // 64
    language = LanguageConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocab_size, max_position_embeddings=2048,
    )  # fmt: skip
    model = ModelConfig(vision, language, image_token_index=vocab_size - 1, image_grid_pinpoints=[[28, 28]])
    return Recipe(model=model, training=TrainingConfig(bf16=bf16))


def same_weights(weights: torch.nn.Module, recipe: Recipe) -> VisionLanguageModel:
    """Our model with the weights of a transformers model."""
    (model,) = build_model(recipe)
    transformers_loop.copy_weights(weights, model, recipe)
    return model
