"""The linear layers of a transformer layer: megatron-core's own, or Transformer Engine's (`transformer_impl`).

Both are column- and row-parallel layers with the same weights under the same names, so that a checkpoint of one loads
into the other. Norms are modules of their own in either case: Transformer Engine's fused norm-linear expects a norm
with a weight, which OLMo's has not.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.model.layers.inference_linear import InferenceColumnParallelLinear, InferenceRowParallelLinear
from megatron_vlm.model.layers.lora import ColumnAdapters, RowAdapters, layer_adapters, with_adapters
from megatron_vlm.runtime.device import on_gpu


@dataclass(frozen=True)
class LinearLayers:
    """The class of each linear layer."""

    qkv: Any = ColumnParallelLinear
    out: Any = RowParallelLinear
    fc1: Any = ColumnParallelLinear
    fc2: Any = RowParallelLinear


def linear_layers(recipe: Recipe) -> LinearLayers:
    """Those of the language model. The vision tower always has megatron-core's, which are faster there.

    Raises:
        ConfigError: the recipe asks for Transformer Engine, which does not work here.
    """
    return _with_lora(_linear_layers(recipe), recipe)


def _with_lora(linears: LinearLayers, recipe: Recipe) -> LinearLayers:
    """Those layers, with adapters where the recipe asks for some."""

    def adapted(layer: str, linear: Any, adapters: Any) -> Any:
        chosen = layer_adapters(recipe, layer)
        return linear if chosen is None else with_adapters(linear, adapters, chosen)

    return LinearLayers(
        qkv=adapted("linear_qkv", linears.qkv, ColumnAdapters),
        out=adapted("linear_proj", linears.out, RowAdapters),
        fc1=adapted("linear_fc1", linears.fc1, ColumnAdapters),
        fc2=adapted("linear_fc2", linears.fc2, RowAdapters),
    )


def _linear_layers(recipe: Recipe) -> LinearLayers:
    if recipe.training.transformer_impl == "local":
        if on_gpu():
            return LinearLayers()
        column, row = InferenceColumnParallelLinear, InferenceRowParallelLinear
        return LinearLayers(column, row, column, row)
    problem = "needs a GPU" if not on_gpu() else _import_problem()
    if problem is not None:
        raise ConfigError(
            f"training.transformer_impl = transformer_engine: {problem}. Install Transformer Engine for PyTorch (extra "
            "`cuda`; on ROCm, as AMD's training image has it), or use transformer_impl = local."
        )
    column, row = _transformer_engine_classes()
    return LinearLayers(column, _without_fp8(row) if recipe.training.fp8_format else row, column, row)


@functools.cache
def _import_problem() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # missing, or built for another torch
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def _transformer_engine_classes() -> tuple[Any, Any]:
    """megatron-core's column- and row-parallel layers on Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


@functools.cache
def _without_fp8(layer: Any) -> Any:
    """A layer class that computes in bf16 inside megatron-core's FP8 context.

    For attention's output projection: on an H200 it ran at 637 TFLOP/s in FP8 and at 692 in bf16.
    """

    class Bf16Linear(layer):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            from transformer_engine.pytorch import fp8_autocast

            with fp8_autocast(enabled=False):
                output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(*args, **kwargs)
                return output

    return Bf16Linear
