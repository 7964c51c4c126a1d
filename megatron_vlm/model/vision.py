"""The vision tower: CLIP's or SigLIP's ViT on megatron-core's transformer block.

All tiles of a rank lie end to end in one sequence, each a document of its own (577 tokens for CLIP-L/14-336: a prime,
so tiles are never cut). An isolated dummy document pads the sequence to a multiple of the tensor ranks, so that
sequence parallelism works for any number of tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import VisionConfig
from megatron_vlm.model.layer_spec import block_spec
from megatron_vlm.model.norm import LayerNorm
from megatron_vlm.model.packed_sequence import packed_sequence
from megatron_vlm.model.sharding import count_tensor_replicas


class UnusedLayers(torch.nn.Module):
    """The published tower's last layers, post-norm and head: no feature needs them, but an export must give them back.

    They are buffers under transformers' names with `__` for `.`, zero until a checkpoint fills them.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in unused_shapes(config).items():
            self.register_buffer(name.replace(".", "__"), torch.zeros(shape, dtype=dtype))


def unused_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Names, as transformers has them inside `vision_model.`, and shapes of what the feature does not use."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"post_layernorm.weight": (width,), "post_layernorm.bias": (width,)}
    linears = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in range(config.num_layers_used, config.num_hidden_layers):
        prefix = f"encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
        for linear, shape in linears.items():
            shapes |= {f"{prefix}{linear}.weight": shape, f"{prefix}{linear}.bias": shape[:1]}
    if config.pooling_head:
        shapes |= {"head.probe": (1, 1, width)}
        shapes |= {"head.attention.in_proj_weight": (3 * width, width), "head.attention.in_proj_bias": (3 * width,)}
        shapes |= {"head.layernorm.weight": (width,), "head.layernorm.bias": (width,)}
        of_head = {"attention.out_proj": (width, width), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for linear, shape in of_head.items():
            shapes |= {f"head.{linear}.weight": shape, f"head.{linear}.bias": shape[:1]}
    return shapes


class VisionTower(MegatronModule):
    """A ViT up to the layer whose output is the feature; class token, pre-norm and patch bias are there or not."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.vision, self.tensor_group = vision, groups.tp
        width, dtype = vision.hidden_size, config.params_dtype
        self.patch_embedding = torch.nn.Conv2d(
            3, width, vision.patch_size, stride=vision.patch_size, bias=vision.patch_bias, dtype=dtype
        )
        if vision.class_token:
            self.class_embedding = torch.nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embedding = torch.nn.Embedding(vision.tokens_per_tile, width, dtype=dtype)
        if vision.pre_norm:
            # The embeddings and this norm run on whole tiles, alike on every tensor rank, before the sequence is cut.
            self.pre_norm = LayerNorm(config, width, vision.layer_norm_eps)
            for parameter in self.pre_norm.parameters():
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
        self.decoder = TransformerBlock(
            config, block_spec(LayerNorm, config.num_layers), post_layer_norm=False, pg_collection=groups
        )
        self.unused = UnusedLayers(vision, dtype)
        self.replicated = False

    def embed(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """[n, 3, side, side] -> [n, tokens per tile, width], the class token first."""
        tokens = self.patch_embedding(tiles_NCHW.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.vision.class_token:
            tokens = torch.cat([self.class_embedding.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = tokens + self.position_embedding.weight
        return self.pre_norm(tokens) if self.vision.pre_norm else tokens

    def forward(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """[n, 3, side, side] -> this tensor rank's slice of [n * tokens per tile + padding, 1, width]."""
        tokens = self.embed(tiles_NCHW)
        each = tokens.shape[1]
        hidden = tokens.flatten(0, 1)[:, None]
        padding = -len(hidden) % self.tensor_group.size()
        cu_seqlens = [each * tile for tile in range(len(tokens) + 1)]
        if padding:
            hidden = torch.cat([hidden, hidden.new_zeros(padding, *hidden.shape[1:])])
            cu_seqlens.append(cu_seqlens[-1] + padding)
        layout = packed_sequence(cu_seqlens, causal=False, device=hidden.device)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tensor_group)
        return self.decoder(hidden, attention_mask=None, packed_seq_params=layout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return count_tensor_replicas(state) if self.replicated else state

    def drop_class_tokens(self, gathered: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """[num_tiles * tokens per tile + padding, width], put together again -> [num_tiles, patches, width]."""
        each = self.vision.tokens_per_tile
        return gathered[: num_tiles * each].view(num_tiles, each, -1)[:, int(self.vision.class_token) :]


def mark_as_replicated(tower: VisionTower) -> None:
    """Tell megatron-core that every tensor rank holds this whole tower and sees other tiles with it.

    `sequence_parallel`: gradients are summed over the tensor group. `tensor_model_parallel` off: the gradient norm
    counts the tower once, not once per tensor rank (its layers were built in a tensor group of one and say otherwise).
    """
    tower.replicated = True
    for parameter in tower.parameters():
        marked: Any = parameter
        marked.sequence_parallel = True
        marked.tensor_model_parallel = False
