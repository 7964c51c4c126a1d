"""Linear layers on a CPU without gradients: matrix products with a few rows, as decode has one per running request.

They are limited by reading the weight. MKL reads it at 8 to 10 GB/s as F.linear asks for it, and at 13 to 15 GB/s with
the factors exchanged (16 rows, width 2,048, two cores). From about 48 rows on, both take the same time. A row's result
then also has the same bits for 8, 16, 24 and 32 rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

from megatron_vlm.runtime.device import on_gpu

_MOST_ROWS = 32
"""As many as inference_max_requests is by default."""


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., k] and a weight [m, k] -> [..., m], whose memory may have the order [m, ...]; for use without gradients."""
    rows = x.numel() // x.shape[-1]
    if on_gpu() or not 1 < rows <= _MOST_ROWS:
        return torch.matmul(x, weight.t())
    return (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])


class InferenceColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's layer, with `product` and without its autograd functions where there are no gradients."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, k] -> [s, b, m], and the bias if the caller adds it."""
        if torch.is_grad_enabled() or self.sequence_parallel or args or kwargs:
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(input_, *args, **kwargs)
            return output
        return _with_bias(self, product(input_, self.weight))


class InferenceRowParallelLinear(RowParallelLinear):
    """megatron-core's layer, with `product` and without its autograd functions where there are no gradients."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, k / tp] -> [s, b, m], and the bias if the caller adds it."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(input_)
            return output
        part = product(input_, self.weight).contiguous()  # it is sent to other ranks
        return _with_bias(self, reduce_from_tensor_model_parallel_region(part, group=self.tp_group))


def _with_bias(layer: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if layer.bias is None or layer.skip_bias_add:
        return output, layer.bias
    return output + layer.bias, None
