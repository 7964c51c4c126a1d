"""megatron-core's transformer layer with our norm and our attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_vlm.model.layers.attention import PackedAttention
from megatron_vlm.model.layers.attention_kernels import Kernel
from megatron_vlm.model.layers.linear_layers import LinearLayers


def block_spec(
    norm: type[torch.nn.Module], num_layers: int, kernel: Kernel, linears: LinearLayers | None = None
) -> TransformerBlockSubmodules:
    """A block of `num_layers` pre-norm layers from megatron-core's local spec, which needs no Transformer Engine.

    megatron-core's local attention rejects packed sequences and its norm rejects sequence parallelism, so both are
    replaced; and the linear layers, if `linears` are given.
    """
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    # Checkpoint keys of norms are their module names; the local spec would use those of Transformer Engine's layers.
    layer.submodules.sharded_state_dict_keys_map = {}
    layer.submodules.self_attention.submodules.core_attention = partial(PackedAttention, kernel=kernel)
    if linears is not None:
        attention, mlp = layer.submodules.self_attention.submodules, _submodules(layer.submodules.mlp)
        attention.linear_qkv, attention.linear_proj = linears.qkv, linears.out
        mlp.linear_fc1, mlp.linear_fc2 = linears.fc1, linears.fc2
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _submodules(spec: Any) -> Any:
    """Of a module in a layer spec: a ModuleSpec in megatron-core 0.16, a partial function in 0.19."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
