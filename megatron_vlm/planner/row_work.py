"""The estimated work of one row, apart for what a pipeline stage can hold: vision tower, language layer, loss head."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import lora_parameters
from megatron_vlm.config.training import DEFAULT_RECOMPUTE_MODULES
from megatron_vlm.data.packing.row_cost import RowCost, cost_of_model, head_operations, row_cost

TYPICAL_DOCUMENT = 2048
"""Tokens of a sample with one tiled image and its text; the published instruction mix has 2,270 on average."""
SUPERVISED_SHARE = 1 / 8
"""Answers among all tokens of a row, image tokens included."""


@dataclass(frozen=True)
class RowShape:
    """What a row holds on average."""

    tokens: int
    tiles: float
    document_tokens: float
    """Length of the document that a token is in: the sum of squared lengths over the sum of lengths."""
    supervised_tokens: float

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> RowShape:
        """A row that is full of images, as far as its budgets of tokens and tiles allow. It needs no data."""
        tokens = recipe.data.seq_length
        tiles = min(recipe.data.max_tiles_per_row, tokens // max(1, recipe.model.vision.patches_per_tile))
        return cls(tokens, tiles, min(tokens, TYPICAL_DOCUMENT), tokens * SUPERVISED_SHARE)


@dataclass(frozen=True)
class RowWork:
    """Forward and backward work of a row, recomputation included: operations, or the unit of `data.cost_per_*`."""

    tower: float
    """Vision tower and projector."""
    layer: float
    """One language layer."""
    head: float
    """Final norm and loss head."""


def row_work(recipe: Recipe, shape: RowShape | None = None) -> RowWork:
    """The work of a row of `shape`, by default that of RowShape.of_recipe."""
    shape = shape or RowShape.of_recipe(recipe)
    model, training = recipe.model, recipe.training
    cost, operations = row_cost(recipe), _operations(recipe)
    layers = model.language.num_hidden_layers
    layer = (cost.per_token_squared * shape.document_tokens + cost.per_token) * shape.tokens / layers
    tower = cost.per_tile * shape.tiles
    layer += _recomputed_layer(recipe, cost, shape) * shape.tokens / layers
    if training.recomputes_vision and "vision" in training.trainable:
        tower *= 4 / 3
    head = head_operations(model, tuple(training.trainable)) * shape.supervised_tokens
    return RowWork(tower=tower, layer=layer, head=head * cost.per_token / max(operations.per_token, 1.0))


def _operations(recipe: Recipe) -> RowCost:
    training = recipe.training
    adapters = lora_parameters(recipe.model.language, training)
    return cost_of_model(recipe.model, tuple(training.trainable), adapters)


def _forward_share(recipe: Recipe) -> float:
    """Of the work of the linear layers: a half of frozen ones, a third of trained ones and of adapters."""
    adapters = 6 * lora_parameters(recipe.model.language, recipe.training)
    whole = _operations(recipe).per_token
    return ((whole - adapters) / (2 + ("language" in recipe.training.trainable)) + adapters / 3) / max(whole, 1.0)


def _recomputed_layer(recipe: Recipe, cost: RowCost, shape: RowShape) -> float:
    """Work per token of what backward computes again, over all layers."""
    training, language = recipe.training, recipe.model.language
    attention = cost.per_token_squared * shape.document_tokens / 3
    linear = cost.per_token * _forward_share(recipe)
    if training.recompute_granularity == "full":
        limit = training.recompute_num_layers or language.num_hidden_layers
        stages = recipe.parallel.pipeline_model_parallel_size * recipe.parallel.virtual_pipeline_model_parallel_size
        return (attention + linear) * min(1.0, limit * stages / language.num_hidden_layers)
    if training.recompute_granularity != "selective":
        return 0.0
    modules = training.recompute_modules or DEFAULT_RECOMPUTE_MODULES
    heads = language.head_width * (language.num_attention_heads + language.num_key_value_heads)
    mlp = 6 * language.intermediate_size / (4 * heads + 6 * language.intermediate_size)
    return attention * ("core_attn" in modules) + linear * mlp * ("mlp" in modules)
