"""What a row costs: a·Σl² + b·Σl + c·tiles over its documents of l tokens, from the model's floating-point operations.

A multiplication and an addition are two operations; a backward pass costs as much as a forward one for the gradients
of what goes in and as much again for those of weights that are trained (Kaplan et al., arXiv:2001.08361, section 2.1;
the attention term as in Narayanan et al., arXiv:2104.04473, appendix). With h the decoder's width, f its MLP's, n its
layers, q and k the width of all its query and of all its key heads; w, m, d the tower's width, MLP width and used
layers; p its patches of s values each, t its tokens of a tile; v, l and r 1 if tower, language model or projector are
trained, else 0:

    a = 3 · n · 2q                                            causal scores and values, forward and backward
    b = (2 + l) · n · (4hq + 4hk + 6hf)                       projections and SwiGLU
    c = (1 + 2v) · d · t · (8w² + 4wm + 4tw)                  tower
        + (1 + v) · p · 2sw                                   its patch embedding
        + t · 2((1 + r + v) · wh + (1 + r + max(r, v)) · h²)  projector

The tests hold this against what torch counts in the real modules. The loss head is left out: it sees the loss tokens
alone, a hundredth of the work. So is recomputation, on purpose: the rows of a run must stay the same when it goes on
with another setting to save memory. Kernels do not all reach the same share of a device's peak; who has measured
theirs gives `data.cost_per_token_squared`, `cost_per_token` and `cost_per_tile`. Only their ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.training import PARTS

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe

_LEVELS = 1 << 23
"""Whole costs that a row within its budgets may have: sums of them are exact in 32-bit floating point, so that every
machine finds the same plan whatever the order in which it adds.
"""


@dataclass(frozen=True)
class RowCost:
    """The three coefficients, in any unit."""

    per_token_squared: float
    """a"""
    per_token: float
    """b"""
    per_tile: float
    """c"""

    def of(self, tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Cost of each sample, float64, from its tokens and tiles; a row costs the sum over its samples."""
        length = tokens.astype(np.float64)
        return self.per_token_squared * (length * length) + self.per_token * length + self.per_tile * tiles

    def quantized(self, tokens: np.ndarray, tiles: np.ndarray, seq_length: int, max_tiles: int) -> np.ndarray:
        """The same as whole numbers, float32, in a unit in which no row within its budgets exceeds 2**23."""
        largest = float(self.of(np.array([seq_length]), np.array([max_tiles]))[0])
        if not largest > 0:
            return np.zeros(len(tokens), np.float32)
        return np.rint(self.of(tokens, tiles) * (_LEVELS / largest)).astype(np.float32)


def cost_of_model(model: ModelConfig, trainable: tuple[str, ...] = PARTS) -> RowCost:
    """Coefficients in floating-point operations of a training step; the formula is at the head of this module."""
    language, vision = model.language, model.vision
    trained = {part: int(part in trainable) for part in PARTS}
    h, queries = language.hidden_size, language.num_attention_heads * language.head_width
    keys = language.num_key_value_heads * language.head_width
    linear = language.num_hidden_layers * (4 * h * queries + 4 * h * keys + 6 * h * language.intermediate_size)
    w, positions = vision.hidden_size, vision.tokens_per_tile
    layer = positions * (8 * w * w + 4 * w * vision.intermediate_size + 4 * positions * w)
    embedding = vision.patches_per_tile * 2 * 3 * vision.patch_size**2 * w
    passes = 1 + trained["projector"] + trained["vision"]
    second_passes = 1 + trained["projector"] + max(trained["projector"], trained["vision"])
    return RowCost(
        per_token_squared=3 * language.num_hidden_layers * 2.0 * queries,
        per_token=(2.0 + trained["language"]) * linear,
        per_tile=(1.0 + 2 * trained["vision"]) * vision.num_layers_used * layer
        + (1 + trained["vision"]) * embedding
        + positions * 2 * (passes * w * h + second_passes * h * h),
    )


def row_cost(recipe: Recipe) -> RowCost:
    """The operations of the recipe's model, given what of it is trained, or the recipe's own coefficients."""
    data, model = recipe.data, cost_of_model(recipe.model, tuple(recipe.training.trainable))
    given = (data.cost_per_token_squared, data.cost_per_token, data.cost_per_tile)
    counted = (model.per_token_squared, model.per_token, model.per_tile)
    return RowCost(*(own if value is None else value for value, own in zip(given, counted, strict=True)))
