"""Bytes that a row keeps on a rank for its backward pass, by what the modules of `model/` save.

With s tokens of this rank between the linear layers, g tokens inside them (s times the tensor ranks), b bytes per
number, hidden size h, MLP size f, and q and k the widths of this rank's query and key heads, a trained language layer
keeps

    s (2 n + 2 h b)             inputs and outputs of its two norms; n is h b, or 4 h where they compute in fp32
    g (q + 2 k) b               query, key and value, after the rotary embedding
    g q b                       output of attention (twice where it is copied before the projection)
    g 4 heads                   fp32 log-sum-exp
    g (2 f + f) b               output of the first linear layer of the MLP, and of SwiGLU

A frozen layer keeps no input of a linear layer, unless a LoRA adapter beside it is trained. With m adapters of rank r,
the layer keeps r m b more per token, and their As stacked. A CPU has no fused kernels: keys and values are repeated to
the number of query heads, attention runs per group of documents, and SwiGLU keeps one more tensor of size f.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import FUSED_LAYERS, uses_lora
from megatron_vlm.config.training import DEFAULT_RECOMPUTE_MODULES
from megatron_vlm.planner.row_work import RowShape

FP32, INDEX = 4, 8


@dataclass(frozen=True)
class Activations:
    """Bytes that one row keeps on one rank."""

    layer: int
    """Of each language layer that is not recomputed as a whole."""
    recomputed_layer: int
    """Of each language layer that is: its input."""
    tower: int
    """Of embedding, vision tower and projector, on the first stage."""
    row: int
    """Of each model chunk: the rotary tables."""
    head: int
    """Of the last stage."""
    layer_peak: int
    """What the backward pass of one language layer recomputes, for a moment."""
    tower_peak: int
    """The same for one layer of the vision tower."""


def activations(recipe: Recipe, shape: RowShape, *, fused: bool) -> Activations:
    """What a row of `shape` keeps. `fused`: with the kernels of a GPU, otherwise those of a CPU."""
    parallel, training, language = recipe.parallel, recipe.training, recipe.model.language
    size = _Sizes.of(recipe, shape)
    granularity = training.recompute_granularity
    modules = set(training.recompute_modules or DEFAULT_RECOMPUTE_MODULES) if granularity == "selective" else set()
    trained = "language" in training.trainable
    attention, mlp = _attention(recipe, size, fused, "core_attn" in modules), _mlp(recipe, size, fused, False)
    norms = sum(_norm(recipe, size, fused, _keeps_input(recipe, layer)) for layer in ("linear_qkv", "linear_fc1"))
    full = norms + attention + mlp
    layer = norms + attention + (_mlp(recipe, size, fused, True) if "mlp" in modules else mlp)
    boundary = size.s * language.hidden_size * size.b
    tower, tower_peak = _tower(recipe, size, fused)
    supervised = int(shape.supervised_tokens / parallel.context_parallel_size)
    weight = language.vocab_size * language.hidden_size // parallel.tensor_model_parallel_size
    return Activations(
        layer=layer,
        recomputed_layer=boundary,
        tower=tower,
        row=shape.tokens * language.head_width * FP32,
        head=_norm(recipe, size, fused, output=False)
        + supervised * (language.hidden_size * size.b + 2 * INDEX)
        + (FP32 * weight if trained else 0),
        layer_peak=full - (boundary if granularity == "full" else layer),
        tower_peak=tower_peak,
    )


@dataclass(frozen=True)
class _Sizes:
    b: int
    """Bytes per number."""
    s: int
    """Tokens of this rank between linear layers: a slice of its context slice, under sequence parallelism."""
    g: int
    """Tokens inside linear layers, whose width is split over the tensor ranks."""
    tensor: int
    tile_tokens: int
    """Tokens of this rank in the vision tower, all of them where tensor ranks share a tile."""

    @classmethod
    def of(cls, recipe: Recipe, shape: RowShape) -> _Sizes:
        parallel = recipe.parallel
        tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        ranks = context if parallel.vision_parallel == "tensor" else tensor * context
        tiles = max(1, int(-(-shape.tiles // ranks)))
        return cls(
            b=2 if recipe.training.bf16 else FP32,
            s=shape.tokens // (tensor * context),
            g=shape.tokens // context,
            tensor=tensor,
            tile_tokens=tiles * recipe.model.vision.tokens_per_tile,
        )


def _adapted(recipe: Recipe, layer: str) -> int:
    """Adapters of one of megatron-core's linear layers."""
    training = recipe.training
    return len(set(FUSED_LAYERS[layer]) & set(training.lora_target_modules)) if uses_lora(training) else 0


def _keeps_input(recipe: Recipe, layer: str) -> bool:
    """Whether a linear layer's input is kept, because its weight or an adapter is trained."""
    return "language" in recipe.training.trainable or _adapted(recipe, layer) > 0


def _adapters(recipe: Recipe, size: _Sizes, layer: str) -> int:
    """What the adapters of a linear layer keep besides its input."""
    numbers, row_parallel = _adapted(recipe, layer) * recipe.training.lora_r, layer in ("linear_proj", "linear_fc2")
    if row_parallel:
        return size.s * numbers * size.b
    return (size.g + recipe.model.language.hidden_size) * numbers * size.b


def _norm(recipe: Recipe, size: _Sizes, fused: bool, output: bool) -> int:
    """A norm's input, and its `output` where the linear layer after it needs that."""
    language = recipe.model.language
    trained = "language" in recipe.training.trainable
    kept = size.b if fused else FP32
    if output:
        kept += size.b
    if language.normalization == "RMSNorm" and trained and not fused:
        kept += size.b  # before it is multiplied with the weight
    return size.s * language.hidden_size * kept


def _attention(recipe: Recipe, size: _Sizes, fused: bool, recomputed: bool) -> int:
    language, context = recipe.model.language, recipe.parallel.context_parallel_size
    trained = _keeps_input(recipe, "linear_proj")
    adapters = _adapters(recipe, size, "linear_qkv") + _adapters(recipe, size, "linear_proj")
    queries = language.num_attention_heads * language.head_width // size.tensor
    heads = max(1, language.num_key_value_heads // size.tensor)
    keys = heads * language.head_width
    if recomputed:  # query, key and value, and what the next linear layer needs
        splits_heads = context == 1 and language.num_key_value_heads >= size.tensor
        grouped = heads > 1 and keys != queries and not splits_heads  # then query is copied beside qkv's output
        kept = queries + 2 * keys + (queries if grouped else 0) + (queries if trained else 0)
        return size.g * size.b * kept + adapters
    if context > heads:
        keys = context * language.head_width  # repeated, so that each context rank has one
    if not fused:
        keys = queries
    copied = trained and (not fused or context > 1)
    lse = FP32 * language.num_attention_heads // size.tensor
    return size.g * (size.b * (queries + 2 * keys + queries * (2 if copied else 1)) + lse) + adapters


def _mlp(recipe: Recipe, size: _Sizes, fused: bool, recomputed: bool) -> int:
    language = recipe.model.language
    if recomputed:  # its input, which a trained one keeps anyway
        return 0 if _keeps_input(recipe, "linear_fc1") else size.s * language.hidden_size * size.b
    width = language.intermediate_size // size.tensor
    adapters = _adapters(recipe, size, "linear_fc1") + _adapters(recipe, size, "linear_fc2")
    kept = 2 + (0 if fused else 1) + (1 if _keeps_input(recipe, "linear_fc2") else 0)
    return size.g * width * size.b * kept + adapters


def _tower(recipe: Recipe, size: _Sizes, fused: bool) -> tuple[int, int]:
    """Bytes of embedding, vision tower and projector, and what recomputing one layer of the tower adds."""
    vision, trainable = recipe.model.vision, recipe.training.trainable
    width, b, tokens = vision.hidden_size, size.b, size.tile_tokens
    split = size.tensor if recipe.parallel.vision_parallel == "tensor" else 1
    kept, peak = 0, 0
    if "vision" in trainable:
        inner = vision.intermediate_size // split
        gelu = 3 if vision.hidden_act == "quick_gelu" and not fused else 2
        attention = 4 * (width // split) * b + FP32 * vision.num_attention_heads // split
        layer = tokens // split * 4 * width * b + tokens * (attention + gelu * inner * b)
        boundary = tokens // split * width * b
        recomputed = recipe.training.recomputes_vision
        peak = layer - boundary if recomputed else 0
        pixels = tokens // vision.tokens_per_tile * 3 * vision.image_size**2 * b
        embedding = pixels + (tokens * width * b if vision.pre_norm else 0)
        kept += vision.num_layers_used * (boundary if recomputed else layer) + embedding
    linear = "projector" in trainable
    if linear or "vision" in trainable:
        share = tokens // split
        kept += share * b * (recipe.model.language.hidden_size * (1 + linear) + width * linear)
    return kept, peak
