"""Checks of the model's sizes, on their own and against the parallel sizes."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megatron_vlm.config.checks.problems import Problem, divides, divisors, multiples_around
from megatron_vlm.config.pipeline_layout import AUTO, format_layout, parse_layout
from megatron_vlm.config.recipe import Recipe


def check_vision(recipe: Recipe) -> Iterator[Problem]:
    """Check the vision tower, its tiles, and its sharding over tensor ranks."""
    vision, tensor = recipe.model.vision, recipe.parallel.tensor_model_parallel_size
    if not divides(vision.num_attention_heads, vision.hidden_size):
        yield Problem(
            "model.vision.hidden_size",
            vision.hidden_size,
            f"not divisible by model.vision.num_attention_heads = {vision.num_attention_heads}",
            f"Use {multiples_around(vision.hidden_size, vision.num_attention_heads)}, or another number of heads",
        )
    # SigLIP (384 / 14) ignores the last pixels of a tile. CLIP does not allow that.
    if vision.class_token and not divides(vision.patch_size, vision.image_size):
        yield Problem(
            "model.vision.image_size",
            vision.image_size,
            f"not divisible by patch_size = {vision.patch_size}",
            f"Use {multiples_around(vision.image_size, vision.patch_size)}, or another patch_size",
        )
    if vision.vision_feature_layer >= 0 or vision.num_layers_used < 1:
        yield Problem(
            "model.vision.vision_feature_layer",
            vision.vision_feature_layer,
            f"not a hidden state of a vision tower with {vision.num_hidden_layers} layers, counted from the last",
            f"Use a number from {-vision.num_hidden_layers} to -1; -2 is the output of the second-to-last layer",
        )
    if recipe.parallel.vision_parallel == "tensor":
        for name in ("num_attention_heads", "intermediate_size"):
            size = getattr(vision, name)
            if not divides(tensor, size):
                yield Problem(
                    f"model.vision.{name}",
                    size,
                    f"not divisible by tensor_model_parallel_size = {tensor}, as vision_parallel = tensor requires",
                    f"Use a tensor_model_parallel_size of {divisors(size, tensor)}, or vision_parallel = data",
                )
    yield from _check_pinpoints(recipe)


def _check_pinpoints(recipe: Recipe) -> Iterator[Problem]:
    side, pinpoints = recipe.model.vision.image_size, recipe.model.image_grid_pinpoints
    key = "model.image_grid_pinpoints"
    if not pinpoints:
        yield Problem(key, [], "empty", f"Give at least one [width, height]; [[{side}, {side}]] is a single tile")
    for pinpoint in pinpoints:
        if len(pinpoint) != 2:
            yield Problem(key, pinpoint, "not a pair", "Give each resolution as [width, height]")
        elif side >= 1 and not all(length >= 1 and length % side == 0 for length in pinpoint):
            yield Problem(
                key,
                pinpoint,
                f"width and height must be multiples of model.vision.image_size = {side}",
                f"Use resolutions such as [{side}, {2 * side}]",
            )


def check_language(recipe: Recipe) -> Iterator[Problem]:
    """Check the language model, and its sharding over tensor, context and pipeline ranks."""
    language, parallel = recipe.model.language, recipe.parallel
    tensor = parallel.tensor_model_parallel_size
    heads, key_value_heads = language.num_attention_heads, language.num_key_value_heads
    if language.head_dim is not None:
        if language.head_dim < 2 or language.head_dim % 2:
            yield Problem(
                "model.language.head_dim",
                language.head_dim,
                "the rotary embedding requires an even head size",
                "Use an even number, or leave it out for hidden_size / num_attention_heads",
            )
    elif not divides(heads, language.hidden_size):
        yield Problem(
            "model.language.hidden_size",
            language.hidden_size,
            f"not divisible by num_attention_heads = {heads}",
            f"Use {multiples_around(language.hidden_size, heads)}, or another number of heads",
        )
    elif not divides(2 * heads, language.hidden_size):
        yield Problem(
            "model.language.hidden_size",
            language.hidden_size,
            f"the head size is {language.hidden_size // heads}, and the rotary embedding requires an even one",
            f"Use {multiples_around(language.hidden_size, 2 * heads)}, or another number of heads",
        )
    if not divides(key_value_heads, heads):
        yield Problem(
            "model.language.num_key_value_heads",
            key_value_heads,
            f"does not divide num_attention_heads = {heads}",
            f"Use {divisors(heads, heads)}",
        )
    yield from _check_head_split(recipe)
    if not divides(tensor, language.intermediate_size):
        yield Problem(
            "model.language.intermediate_size",
            language.intermediate_size,
            f"not divisible by tensor_model_parallel_size = {tensor}",
            f"Use a tensor_model_parallel_size of {divisors(language.intermediate_size, tensor)}",
        )
    if not divides(tensor, language.vocab_size):
        padded = -(-language.vocab_size // tensor) * tensor
        yield Problem(
            "model.language.vocab_size",
            language.vocab_size,
            f"not divisible by tensor_model_parallel_size = {tensor}",
            f"Pad the vocabulary to {padded}, or use a tensor_model_parallel_size of "
            f"{divisors(language.vocab_size, tensor)}",
        )
    if language.vocab_size >= 1 and not 0 <= recipe.model.image_token_index < language.vocab_size:
        yield Problem(
            "model.image_token_index",
            recipe.model.image_token_index,
            f"outside the vocabulary of model.language.vocab_size = {language.vocab_size}",
            f"Use an id from 0 to {language.vocab_size - 1} that the tokenizer does not use",
        )
    yield from _check_layer_split(recipe)


def _check_head_split(recipe: Recipe) -> Iterator[Problem]:
    """Heads are sharded over tensor ranks, and by Ulysses over context ranks."""
    language, parallel = recipe.model.language, recipe.parallel
    tensor, ranks = (
        parallel.tensor_model_parallel_size,
        parallel.tensor_model_parallel_size * parallel.context_parallel_size,
    )
    heads, key_value_heads = language.num_attention_heads, language.num_key_value_heads
    if not divides(ranks, heads):
        yield Problem(
            "model.language.num_attention_heads",
            heads,
            f"not divisible by tensor_model_parallel_size * context_parallel_size = {ranks}",
            f"Make that product {divisors(heads, ranks)}",
        )
    # Fewer heads than ranks are replicated, so that each rank has exactly one.
    elif not all(divides(size, key_value_heads) or divides(key_value_heads, size) for size in (tensor, ranks)):
        yield Problem(
            "model.language.num_key_value_heads",
            key_value_heads,
            f"can neither be sharded nor replicated evenly over tensor_model_parallel_size = {tensor} and "
            f"tensor_model_parallel_size * context_parallel_size = {ranks}",
            f"Use parallel sizes that divide {key_value_heads} or are multiples of it",
        )
    # Tensor ranks hold shards of equal size of the weights. (Zero heads are reported by check_values.)
    elif (
        heads > 0
        and divides(heads, language.hidden_size)
        and not divides(tensor, 2 * key_value_heads * language.head_width)
    ):
        yield Problem(
            "model.language.num_key_value_heads",
            key_value_heads,
            f"the size of keys and values, {2 * key_value_heads} x {language.head_width}, is not divisible by "
            f"tensor_model_parallel_size = {tensor}",
            "Use a tensor_model_parallel_size of "
            f"{divisors(gcd(heads, 2 * key_value_heads * language.head_width), tensor)}",
        )


def _check_layer_split(recipe: Recipe) -> Iterator[Problem]:
    parallel, layers = recipe.parallel, recipe.model.language.num_hidden_layers
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    layout = parallel.pipeline_model_parallel_layout
    product = "pipeline_model_parallel_size"
    if parallel.virtual_pipeline_model_parallel_size > 1:
        product += " * virtual_pipeline_model_parallel_size"
    if layout is None:
        if not divides(stages, layers):
            yield Problem(
                "model.language.num_hidden_layers",
                layers,
                f"not divisible by {product} = {stages}",
                f"Make that {'product ' if '*' in product else ''}{divisors(layers, stages)}, or use "
                "pipeline_model_parallel_layout = auto",
            )
    elif layout == AUTO:
        if stages > layers + 1:
            yield Problem(
                "parallel.pipeline_model_parallel_layout",
                layout,
                f"{product} = {stages} stages are too many for {layers} layers and the vision tower",
                f"Make that at most {layers + 1}",
            )
    else:
        yield from _check_layout(layout, layers, stages, product)


def _check_layout(layout: str, layers: int, stages: int, product: str) -> Iterator[Problem]:
    key = "parallel.pipeline_model_parallel_layout"
    even = [layers // stages + (stage >= stages - layers % stages) for stage in range(stages)] if stages > 0 else []
    remedy = f"Use auto, or for example {format_layout(even)}"
    try:
        given = parse_layout(layout)
    except ValueError as wrong:
        yield Problem(key, layout, str(wrong), remedy)
        return
    if len(given) != stages:
        yield Problem(key, layout, f"{len(given)} stages, but {product} = {stages}", remedy)
    elif sum(given) != layers:
        yield Problem(
            key, layout, f"{sum(given)} language layers, but model.language.num_hidden_layers = {layers}", remedy
        )
