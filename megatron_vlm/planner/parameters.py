"""How many parameters one rank holds: exactly those of the model that `model/build.py` makes there."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config import PARTS, ModelConfig, Recipe
from megatron_vlm.config.lora import FUSED_LAYERS, ROW_PARALLEL, lora_sizes, uses_lora
from megatron_vlm.planner.balance import layers_per_stage


@dataclass(frozen=True)
class RankParameters:
    """Parameters of a pipeline rank, over all of its model chunks."""

    vision: int
    projector: int
    language: int
    language_lora: int
    """Of adapters; 0 without LoRA."""
    unused: int
    """Of the tower's layers that no feature depends on, which are carried along as buffers."""

    def trained(self, recipe: Recipe) -> int:
        return sum(getattr(self, part) for part in recipe.training.trainable)

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.language + self.language_lora + self.unused


def rank_parameters(recipe: Recipe, pipeline_rank: int) -> RankParameters:
    """Parameters on each tensor rank of pipeline rank `pipeline_rank`."""
    model, parallel = recipe.model, recipe.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    language = model.language
    layers = sum(layers_per_stage(recipe)[pipeline_rank::stages])
    is_first, is_last = pipeline_rank == 0, pipeline_rank == stages - 1
    vocabulary = language.vocab_size * language.hidden_size // tensor
    output_weight = is_last and not (language.tie_word_embeddings and is_first)
    norm = language.hidden_size if language.normalization == "RMSNorm" else 0
    tower_ranks = tensor if parallel.vision_parallel == "tensor" else 1
    return RankParameters(
        vision=_tower(model, tower_ranks) if is_first else 0,
        projector=_projector(model) if is_first else 0,
        language=layers * _layer(model, tensor) + (is_first + output_weight) * vocabulary + is_last * norm,
        language_lora=layers * _adapters(recipe) if uses_lora(recipe.training) else 0,
        unused=_unused(model) if is_first else 0,
    )


def model_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the whole model."""
    whole = rank_parameters(Recipe(model=model), 0)
    return {part: getattr(whole, part) for part in PARTS}


def _layer(model: ModelConfig, tensor: int) -> int:
    language = model.language
    width, queries = language.hidden_size, language.num_attention_heads * language.head_width
    qkv = queries + 2 * language.num_key_value_heads * language.head_width
    weights = width * (qkv + queries + 3 * language.intermediate_size) // tensor
    bias = qkv // tensor if language.attention_bias else 0
    return weights + bias + (2 * width if language.normalization == "RMSNorm" else 0)


def _adapters(recipe: Recipe) -> int:
    """Of one layer on a tensor rank, which has a share of a row-parallel layer's A and of a column-parallel one's B."""
    language, tensor = recipe.model.language, recipe.parallel.tensor_model_parallel_size
    heads_are_whole = language.num_key_value_heads % tensor == 0
    numbers = 0
    for module in set(recipe.training.lora_target_modules):
        inputs, outputs = lora_sizes(language)[module]
        if module in ROW_PARALLEL:
            numbers += inputs // tensor + outputs
        else:
            in_heads = module in FUSED_LAYERS["linear_qkv"]
            numbers += inputs + (outputs // tensor if heads_are_whole or not in_heads else outputs)
    return numbers * recipe.training.lora_r


def _tower_layer(model: ModelConfig, ranks: int) -> int:
    """Linear layers are split over tensor ranks; norms, and biases that are added after the sum over ranks, are not."""
    width, inner = model.vision.hidden_size, model.vision.intermediate_size
    split = width * (4 * width + 2 * inner) + 3 * width + inner
    return split // ranks + 2 * width + 4 * width


def _tower(model: ModelConfig, ranks: int) -> int:
    vision = model.vision
    width = vision.hidden_size
    embeddings = 3 * vision.patch_size**2 * width + vision.tokens_per_tile * width
    extras = width * (vision.patch_bias + vision.class_token + 2 * vision.pre_norm)
    return vision.num_layers_used * _tower_layer(model, ranks) + embeddings + extras


def _unused(model: ModelConfig) -> int:
    vision = model.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    layers = (vision.num_hidden_layers - vision.num_layers_used) * _tower_layer(model, 1) + 2 * width
    mlp = 2 * width * inner + inner + width
    head = width + 2 * width + 3 * width * width + 3 * width + width * width + width + mlp
    return layers + (head if vision.pooling_head else 0)


def _projector(model: ModelConfig) -> int:
    """Two linear layers with biases, and the newline."""
    width = model.language.hidden_size
    return model.vision.hidden_size * width + width * width + 3 * width
