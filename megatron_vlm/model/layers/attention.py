"""Attention within the documents of a packed row, used by the vision tower and the language model.

Context parallelism is Ulysses (arXiv:2309.14509). An all-to-all before the kernel exchanges "a slice of the row, all
heads" for "the whole row, a slice of the heads"; another one after the kernel reverts it. The kernel therefore sees
whole documents, and any variable-length kernel can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.model.layers.attention_kernels import Kernel
from megatron_vlm.model.layers.packed_sequence import PackedSequence
from megatron_vlm.model.layers.rotary import rotate_both


def _to_heads(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """[s / cp, h, d] each, of this rank's slice of the row -> [s, h / cp, d] each, in one all-to-all."""
    ranks = group.size()
    by_rank = torch.cat([x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in tensors], dim=2)
    received = tensor_parallel.all_to_all(group, by_rank).flatten(0, 1)
    return received.split([x.shape[1] // ranks for x in tensors], dim=1)


def _to_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse for one tensor: [s, h / cp, d] -> [s / cp, h, d]."""
    return tensor_parallel.all_to_all(group, x.unflatten(0, (group.size(), -1))).transpose(0, 1).flatten(1, 2)


class PackedAttention(MegatronModule):
    """Core attention of a megatron-core layer on a packed row, which a PackedSequence describes."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        kernel: Kernel,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.kernel, self.scale = kernel, softmax_scale
        self.rotates = True
        """False: query and key come rotated."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> torch.Tensor:
        """Attend within documents.

        Args:
            query: [s, heads, d], this context rank's slice of the row.
            key: [s, kv heads, d].
            value: [s, kv heads, d].
            packed_seq_params: the documents of the whole row.

        Returns:
            [s, heads * d].
        """
        packed = packed_seq_params
        assert packed is not None
        ranks = self.context_group.size()
        if ranks > 1:
            repeats = -(-ranks // key.shape[1]) if key.shape[1] < ranks else 1
            if repeats > 1:  # every rank needs a key/value head: where ranks outnumber heads, heads are repeated
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            query, key, value = _to_heads((query, key, value), self.context_group)
        if self.rotates and packed.cos is not None and packed.sin is not None:
            query, key = rotate_both(query, key, packed.cos, packed.sin)
            # A slice of qkv would keep all of qkv until the backward pass, for the value alone.
            value = value.contiguous()
        if packed.cache is not None:
            out = packed.cache.attend(self.layer_number, query, key, value, packed)
        else:
            out = self.kernel(query, key, value, packed, self.scale)
        if ranks > 1:
            out = _to_sequence(out, self.context_group)
        return out.flatten(1)
