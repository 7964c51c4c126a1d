"""megatron-core's own transformer layer with our norm and our attention in it."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_vlm.model.attention import PackedAttention


def block_spec(norm: type[torch.nn.Module], num_layers: int) -> TransformerBlockSubmodules:
    """A block of `num_layers` pre-norm layers, from the local spec: nothing of Transformer Engine is needed.

    megatron-core's own attention refuses packed rows and its norm refuses sequence parallelism: both are replaced.
    """
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    # Keys of norms stay their module names: the local spec would file them under Transformer Engine's fused layers.
    layer.submodules.sharded_state_dict_keys_map = {}
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
