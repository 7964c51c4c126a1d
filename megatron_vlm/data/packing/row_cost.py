"""The cost of a row: a·Σl² + b·Σl + c·tiles for documents of l tokens, in floating-point operations of the model.

A multiply-add is two operations. A backward pass costs one forward pass for the gradients of the inputs, and another
for those of trainable weights (Kaplan et al., arXiv:2001.08361, section 2.1; the attention term as in Narayanan et
al., arXiv:2104.04473, appendix). Decoder: hidden size h, MLP size f, n layers, total width q of the query heads and k
of the key heads. Vision tower: hidden size w, MLP size m, d layers in use, p patches of s values, t tokens per tile.
v, l and r are 1 if the vision tower, the language model or the projector is trained, else 0:

    a = 3 · n · 2q                                            causal attention, forward and backward
    b = (2 + l) · n · (4hq + 4hk + 6hf)                       projections and SwiGLU
    c = (1 + 2v) · d · t · (8w² + 4wm + 4tw)                  vision tower
        + (1 + v) · p · 2sw                                   patch embedding
        + t · 2((1 + r + v) · wh + (1 + r + max(r, v)) · h²)  projector

With LoRA, whose adapters have u parameters, b is larger by 6u.

The tests compare this with the operations that torch counts in the real modules. The loss head is not included: it
processes supervised tokens only, about 1 % of the work. Recomputation is not included either, so that a run that
resumes with another recomputation setting sees the same rows. Kernels reach different fractions of a device's peak:
measured costs can be set as `data.cost_per_token_squared`, `cost_per_token` and `cost_per_tile`. Only their ratios
matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.config.lora import lora_parameters
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.training import PARTS

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe

_LEVELS = 1 << 23
"""Largest quantized cost of a row within its budgets. Sums of quantized costs are exact in float32, so the plan does
not depend on the order of additions.
"""


@dataclass(frozen=True)
class RowCost:
    """The three coefficients of the cost, in any unit."""

    per_token_squared: float
    """a"""
    per_token: float
    """b"""
    per_tile: float
    """c"""

    def of(self, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """[n] float64: the cost of each sample, from [n] tokens and [n] tiles. A row costs the sum over its samples."""
        length = tokens.astype(np.float64)
        return self.per_token_squared * (length * length) + self.per_token * length + self.per_tile * tiles

    def quantized(self, tokens: np.ndarray, tiles: np.ndarray, seq_length: int, max_tiles: int) -> np.ndarray:
        """[n] float32: the same in whole numbers, scaled so that no row within its budgets costs more than 2**23."""
        largest = float(self.of(np.array([seq_length]), np.array([max_tiles]))[0])
        if not largest > 0:
            return np.zeros(len(tokens), np.float32)
        return np.rint(self.of(tokens, tiles) * (_LEVELS / largest)).astype(np.float32)


def cost_of_model(model: ModelConfig, trainable: tuple[str, ...] = PARTS, adapters: int = 0) -> RowCost:
    """Coefficients in floating-point operations of a training step, by the formula in this module's docstring.

    `adapters` is the number of LoRA parameters.
    """
    language, vision = model.language, model.vision
    trained = {part: int(part in trainable) for part in PARTS}
    h, queries = language.hidden_size, language.num_attention_heads * language.head_width
    keys = language.num_key_value_heads * language.head_width
    linear = language.num_hidden_layers * (4 * h * queries + 4 * h * keys + 6 * h * language.intermediate_size)
    w, tokens = vision.hidden_size, vision.tokens_per_tile
    layer = tokens * (8 * w * w + 4 * w * vision.intermediate_size + 4 * tokens * w)
    embedding = vision.patches_per_tile * 2 * 3 * vision.patch_size**2 * w
    passes = 1 + trained["projector"] + trained["vision"]
    second_passes = 1 + trained["projector"] + max(trained["projector"], trained["vision"])
    return RowCost(
        per_token_squared=3 * language.num_hidden_layers * 2.0 * queries,
        per_token=(2.0 + trained["language"]) * linear + 6.0 * adapters,
        per_tile=(1.0 + 2 * trained["vision"]) * vision.num_layers_used * layer
        + (1 + trained["vision"]) * embedding
        + tokens * 2 * (passes * w * h + second_passes * h * h),
    )


def head_operations(model: ModelConfig, trainable: tuple[str, ...] = PARTS) -> float:
    """Operations of the loss head for one supervised token: logits, and the gradients of the hidden state and of the
    weight, which may be frozen.
    """
    products = 2 + ("language" in trainable)
    return products * 2.0 * model.language.hidden_size * model.language.vocab_size


def step_operations(
    model: ModelConfig, trainable: tuple[str, ...], *, squared_tokens: float, tokens: float, tiles: float,
    supervised_tokens: float, adapters: int = 0,
) -> float:  # fmt: skip
    """Operations of a training step: what its documents need, without padding and without recomputation.

    Args:
        model: of the run.
        trainable: the parts that are trained.
        squared_tokens: sum of the documents' squared lengths.
        tokens: sum of their lengths.
        tiles: number of their tiles.
        supervised_tokens: number of tokens that the loss counts.
        adapters: number of LoRA parameters.
    """
    cost = cost_of_model(model, trainable, adapters)
    row = cost.per_token_squared * squared_tokens + cost.per_token * tokens + cost.per_tile * tiles
    return row + head_operations(model, trainable) * supervised_tokens


def row_cost(recipe: Recipe) -> RowCost:
    """Coefficients of a recipe: its data.cost_* settings; for those that are not set, the operations of its model."""
    data, training = recipe.data, recipe.training
    adapters = lora_parameters(recipe.model.language, training)
    model = cost_of_model(recipe.model, tuple(training.trainable), adapters)
    settings = (data.cost_per_token_squared, data.cost_per_token, data.cost_per_tile)
    counted = (model.per_token_squared, model.per_token, model.per_tile)
    return RowCost(*(default if value is None else value for value, default in zip(settings, counted, strict=True)))
