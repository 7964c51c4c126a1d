"""Small models whose parameters are all random, so that tests notice a swapped or dropped tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.support.random_tokenizer import write_tokenizer

VISION_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "quick_gelu",
}
LANGUAGE_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": 283,
    "max_position_embeddings": 512,
}
GROUPED_QUERY_SIZES = LANGUAGE_SIZES | {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLAMA_SIZES = GROUPED_QUERY_SIZES | {"rms_norm_eps": 1e-4, "vocab_size": 284}
QWEN2_SIZES = LLAMA_SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}
MISTRAL_SIZES = LLAMA_SIZES | {
    "hidden_size": 44,
    "num_attention_heads": 8,
    "head_dim": 10,
    "sliding_window": None,
    "intermediate_size": 58,
}
SIGLIP_SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 9,  # does not divide image_size, as in the published 384 / 14
    "layer_norm_eps": 1e-4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip, llama": {"language": LLAMA_SIZES | {"model_type": "llama"}},
    "siglip, qwen2": {
        "vision": SIGLIP_SIZES | {"model_type": "siglip_vision_model"},
        "language": QWEN2_SIZES | {"model_type": "qwen2"},
    },
    "siglip without head, mistral": {
        "vision": SIGLIP_SIZES | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "language": MISTRAL_SIZES | {"model_type": "mistral"},
        "feature_layer": -1,
    },
}
"""Arguments of llava_next_model for each family besides CLIP with OLMo."""
# (height, width); no pair is followed by its own transpose, so that swapped axes are noticed.
GRID_PINPOINTS = [[28, 28], [56, 28], [84, 28], [28, 56], [56, 56], [28, 84]]


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Sample every parameter from N(0, 0.05), and norm weights from 1 + N(0, 0.2).

    The default initialisation has zero biases and unit norms, which hide a dropped bias or swapped norms.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = "norm" in name and name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(1 + 0.2 * noise if is_norm_weight else 0.05 * noise)


def clip_vision_model(sizes: dict[str, Any] = VISION_SIZES, seed: int = 1) -> Any:
    """A transformers CLIPVisionModel with random parameters."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    randomize(model, seed)
    return model


def _language_config(sizes: dict[str, Any], eos_id: int, pad_id: int) -> Any:
    """A transformers config of the family `model_type`, by default OLMo."""
    from transformers import CONFIG_MAPPING

    settings = {"model_type": "olmo", "tie_word_embeddings": True, "rope_theta": 10000.0, **sizes}
    rope = {"rope_theta": settings.pop("rope_theta"), "rope_type": "default"}
    family = CONFIG_MAPPING[settings.pop("model_type")]
    return family(**settings, rope_parameters=rope, eos_token_id=eos_id, pad_token_id=pad_id, bos_token_id=None)


def _vision_config(sizes: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    settings = {"model_type": "clip_vision_model", **sizes}
    return CONFIG_MAPPING[settings.pop("model_type")](**settings)


def olmo_model(sizes: dict[str, Any] = LANGUAGE_SIZES, seed: int = 2, eos_id: int = 269, pad_id: int = 1) -> Any:
    """A transformers OlmoForCausalLM with random parameters."""
    from transformers import OlmoForCausalLM

    model = OlmoForCausalLM(_language_config(sizes, eos_id, pad_id)).eval()
    randomize(model, seed)
    return model


def llava_next_model(
    vision: dict[str, Any] = VISION_SIZES,
    language: dict[str, Any] = LANGUAGE_SIZES,
    image_token_index: int = 270,
    seed: int = 3,
    pinpoints: list[list[int]] = GRID_PINPOINTS,
    feature_layer: int = -2,
) -> Any:
    """A transformers LlavaNextForConditionalGeneration with random parameters, by default CLIP and OLMo."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    text, tower = _language_config(language, eos_id=image_token_index - 1, pad_id=1), _vision_config(vision)
    config = LlavaNextConfig(
        vision_config=tower,
        text_config=text,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full" if tower.model_type.startswith("siglip") else "default",
        image_token_index=image_token_index,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    randomize(model, seed)
    return model


def write_llava_next(folder: Path, **settings: Any) -> Any:
    """Write llava_next_model(**settings) and its tokenizer into `folder`; returns the model."""
    model = llava_next_model(image_token_index=write_tokenizer(folder), **settings)
    model.save_pretrained(folder)
    return model
