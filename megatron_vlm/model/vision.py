"""The vision tower: the ViT of CLIP or SigLIP on megatron-core's transformer block.

All tiles of a rank form one packed sequence, each tile a document of its own. For sequence parallelism a dummy document
pads it to a multiple of the tensor parallel size: CLIP-L/14-336 has 577 tokens per tile, a prime number.
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
from megatron_vlm.data.rows.document_layout import DocumentLayout
from megatron_vlm.model.layers.attention_kernels import Kernel
from megatron_vlm.model.layers.layer_spec import block_spec
from megatron_vlm.model.layers.linear_layers import LinearLayers
from megatron_vlm.model.layers.norm import LayerNorm
from megatron_vlm.model.layers.packed_sequence import packed_sequence
from megatron_vlm.model.sharding import set_tensor_replica_ids
from megatron_vlm.model.unused_layers import UnusedLayers


class VisionTower(MegatronModule):
    """A ViT up to the feature layer. Class token, pre-norm and patch bias are present if the config says so."""

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, groups: ProcessGroupCollection, kernel: Kernel
    ) -> None:
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
            # The embeddings and this norm run before the sequence is scattered: the same on every tensor rank.
            self.pre_norm = LayerNorm(config, width, vision.layer_norm_eps)
            for parameter in self.pre_norm.parameters():
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
        spec = block_spec(LayerNorm, config.num_layers, kernel, LinearLayers(), groups.tp)
        self.decoder = TransformerBlock(config, spec, post_layer_norm=False, pg_collection=groups)
        self.unused = UnusedLayers(vision, dtype)
        self.replicated = False

    def embed(self, tiles_NCHW: torch.Tensor) -> torch.Tensor:
        """Tiles [n, 3, side, side] -> tokens [n, tokens per tile, width]; the class token is first."""
        tokens = self.patch_embedding(tiles_NCHW.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.vision.class_token:
            tokens = torch.cat([self.class_embedding.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = tokens + self.position_embedding.weight
        return self.pre_norm(tokens) if self.vision.pre_norm else tokens

    def forward(self, tiles_NCHW: torch.Tensor, documents: DocumentLayout) -> torch.Tensor:
        """Tiles [n, 3, side, side] -> this tensor rank's slice of [n * tokens per tile + padding, 1, width].

        `documents` are the tiles, and the padding if there is any (rank_batch.tile_documents).
        """
        tokens = self.embed(tiles_NCHW)
        hidden = tokens.flatten(0, 1)[:, None]
        padding = -len(hidden) % self.tensor_group.size()
        if padding:
            hidden = torch.cat([hidden, hidden.new_zeros(padding, *hidden.shape[1:])])
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tensor_group)
        return self.decoder(hidden, attention_mask=None, packed_seq_params=packed_sequence(documents))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return set_tensor_replica_ids(state) if self.replicated else state

    def drop_class_tokens(self, gathered: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """The gathered output [num_tiles * tokens per tile + padding, width] -> patches [num_tiles, patches, width]."""
        per_tile = self.vision.tokens_per_tile
        return gathered[: num_tiles * per_tile].view(num_tiles, per_tile, -1)[:, int(self.vision.class_token) :]


def mark_as_replicated(tower: VisionTower) -> None:
    """Mark a tower that every tensor rank holds in full and runs on tiles of its own.

    `sequence_parallel` makes megatron-core sum its gradients over the tensor group. Without `tensor_model_parallel`,
    set while the tower was built in a tensor group of one, the gradient norm counts it once, not once per tensor rank.
    """
    tower.replicated = True
    for parameter in tower.parameters():
        marked: Any = parameter
        marked.sequence_parallel = True
        marked.tensor_model_parallel = False
