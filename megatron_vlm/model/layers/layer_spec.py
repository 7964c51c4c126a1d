"""megatron-core's transformer layer with our norm, attention and MLP."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_vlm.model.layers.attention import PackedAttention
from megatron_vlm.model.layers.attention_kernels import Kernel
from megatron_vlm.model.layers.linear_layers import LinearLayers
from megatron_vlm.model.layers.mlp import mlp_class
from megatron_vlm.model.layers.self_attention import PackedSelfAttention


def block_spec(
    norm: type[torch.nn.Module],
    num_layers: int,
    kernel: Kernel,
    linears: LinearLayers,
    tensor_group: dist.ProcessGroup | None = None,
) -> TransformerBlockSubmodules:
    """A block of `num_layers` pre-norm layers from megatron-core's local spec, which needs no Transformer Engine.

    megatron-core's local attention rejects packed sequences and its norm rejects sequence parallelism. Its MLP and
    self-attention are replaced by subclasses with fewer kernels.

    Args:
        norm: class of all norms.
        num_layers: of the block.
        kernel: of attention.
        linears: classes of the linear layers.
        tensor_group: whose ranks share the MLP's linear layers; by default that of the process.
    """
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    # Checkpoint keys of norms are their module names; the local spec would use those of Transformer Engine's layers.
    layer.submodules.sharded_state_dict_keys_map = {}
    layer.submodules.self_attention.module = PackedSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = partial(PackedAttention, kernel=kernel)
    attention.linear_qkv, attention.linear_proj = linears.qkv, linears.out
    layer.submodules.mlp = mlp_class(linears, tensor_group)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
