"""Checks of FP8 against the layers that have it and the sizes that its matrix products need."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.checks.problems import Problem, multiples_around
from megatron_vlm.config.recipe import Recipe

MULTIPLE = 16
"""FP8 products need sizes that are multiples of this on every rank; mxfp8, with blocks of 32 numbers, of twice it."""


def check_fp8(recipe: Recipe) -> Iterator[Problem]:
    """Check the settings of FP8, if it is on."""
    training, language, parallel = recipe.training, recipe.model.language, recipe.parallel
    if training.fp8_format is None:
        return
    if training.transformer_impl != "transformer_engine":
        yield Problem(
            "training.fp8_format",
            training.fp8_format,
            f"transformer_impl = {training.transformer_impl} has no FP8",
            "Set transformer_impl = transformer_engine, or leave fp8_format out",
        )
    if not training.bf16:
        yield Problem("training.fp8_format", training.fp8_format, "bf16 is off", "Set bf16 = true")
    multiple = MULTIPLE * (2 if training.fp8_recipe == "mxfp8" else 1)
    tensor = parallel.tensor_model_parallel_size
    split = tensor * parallel.context_parallel_size
    qkv = (language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_width
    sizes = {
        "data.seq_length": (recipe.data.seq_length, split),
        "model.language.hidden_size": (language.hidden_size, 1),
        "model.language.intermediate_size": (language.intermediate_size, tensor),
    }
    for key, (size, ranks) in sizes.items():
        if size % (multiple * ranks):
            shared = f" on each of {ranks} ranks" if ranks > 1 else ""
            yield Problem(
                key,
                size,
                f"FP8 needs a multiple of {multiple}{shared}",
                f"Use {multiples_around(size, multiple * ranks)}, or leave fp8_format out",
            )
    if qkv % (multiple * tensor):
        yield Problem(
            "model.language.num_attention_heads",
            language.num_attention_heads,
            f"query, key and value have {qkv} columns, and FP8 needs a multiple of {multiple * tensor}",
            "Use other heads or another tensor_model_parallel_size, or leave fp8_format out",
        )
