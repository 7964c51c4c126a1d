import pytest

from checkpoint_convert.mapping.hf_names import canonical_name


@pytest.mark.parametrize(
    ("dialect", "name", "canonical"),
    [
        ("vision", "vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("vision", "encoder.layers.3.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"),
        ("vision", "embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
        ("vision", "text_model.encoder.layers.0.mlp.fc1.bias", None),
        ("vision", "visual_projection.weight", None),
        ("vision", "vision_model.embeddings.position_ids", None),
        ("language", "model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("language", "lm_head.weight", "language_model.lm_head.weight"),
        ("whole", "image_newline", "image_newline"),
        ("whole", "vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("whole", "vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("whole", "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("whole", "language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("whole", "model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("whole", "lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_every_spelling_comes_to_one(dialect: str, name: str, canonical: str | None) -> None:
    assert canonical_name(name, dialect) == canonical
