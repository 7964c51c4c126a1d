"""Every tensor name of a Hugging Face file is translated to one naming, and every name there belongs to a part."""

from __future__ import annotations

import pytest

from checkpoint_convert.mapping.hf_names import PART_PREFIXES, NameFormat, canonical_name, model_part
from checkpoint_convert.mapping.param_map import param_map
from megatron_vlm.config import PARTS, ModelConfig


@pytest.mark.parametrize(
    ("format", "name", "canonical"),
    [
        ("vision", "vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("vision", "encoder.layers.3.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"),
        ("vision", "embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        ("vision", "text_model.encoder.layers.0.mlp.fc1.bias", None),
        ("vision", "visual_projection.weight", None),
        ("vision", "vision_model.embeddings.position_ids", None),
        ("language", "model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("language", "lm_head.weight", "language_model.lm_head.weight"),
        ("llava", "image_newline", "image_newline"),
        ("llava", "vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("llava", "vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("llava", "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("llava", "language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("llava", "model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("llava", "lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_every_name_is_translated_to_one(format: NameFormat, name: str, canonical: str | None) -> None:
    assert canonical_name(name, format) == canonical


def test_parts() -> None:
    parts = {
        "vision_tower.x": "vision",
        "multi_modal_projector.linear_1.bias": "projector",
        "image_newline": "projector",
        "language_model.lm_head.weight": "language",
        "lora_A.weight": None,
    }
    assert {name: model_part(name) for name in parts} == parts
    assert tuple(PART_PREFIXES) == PARTS
    assert {model_part(name) for entry in param_map(ModelConfig()) for name in entry.hf} == set(PARTS)
