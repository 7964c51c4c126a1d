"""megatron-core's MLP with the activation, and fc1's bias if it has one, as one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.model.layers.linear_layers import LinearLayers
from megatron_vlm.model.layers.swiglu import swiglu
from megatron_vlm.runtime.device import fused


@functools.cache
def _with_bias(
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """activation(x + bias) as one kernel, which saves x for backward."""

    @fused
    def biased(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return activation(x + bias)

    return biased


def mlp_class(linears: LinearLayers, tensor_group: dist.ProcessGroup | None = None) -> type[MLP]:
    """The class of a layer's MLP, for a layer spec: SwiGLU without biases, or any activation with them.

    megatron-core's own `bias_activation_fusion` does not know CLIP's activation, quick GELU. And megatron-core 0.16
    gives the tensor group to classes that it knows, and to no other.

    Args:
        linears: classes of its linear layers.
        tensor_group: whose ranks share them; by default that of the process.
    """

    class FusedMLP(MLP):
        def __init__(self, config: TransformerConfig, **_: Any) -> None:
            assert not config.gated_linear_unit or (config.activation_func is F.silu and not config.add_bias_linear)
            submodules = MLPSubmodules(linear_fc1=linears.fc1, linear_fc2=linears.fc2)
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tensor_group)

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            """[s, b, width] -> [s, b, width], and fc2's bias, which the layer adds with the residual."""
            intermediate, bias = self.linear_fc1(hidden_states)
            gated = self.config.gated_linear_unit
            activated = swiglu(intermediate) if gated else _with_bias(self.config.activation_func)(intermediate, bias)
            output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(activated)
            return output

    return FusedMLP
