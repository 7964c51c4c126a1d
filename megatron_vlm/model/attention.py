"""Attention within the documents of a row: the one core attention of both towers.

Context parallelism is Ulysses (arXiv:2309.14509): around the kernel an all-to-all turns "my slice of the row, all
heads" into "the whole row, my heads". So the kernel sees whole documents, rotary positions are the row's own, and any
variable-length kernel serves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.model.attention_kernels import attend
from megatron_vlm.model.packed_sequence import PackedSequence
from megatron_vlm.runtime.device import fused


class _SwapSequenceAndHeads(torch.autograd.Function):
    """[s / cp, h, d] -> [s, h / cp, d] if to_heads, else the way back; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to_heads: bool, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.to_heads, ctx.group = to_heads, group
        split, join = (1, 0) if to_heads else (0, 1)
        sent = torch.stack(x.chunk(group.size(), split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _SwapSequenceAndHeads.apply(grad, not ctx.to_heads, ctx.group), None, None


@fused
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head: x [s, h, d], tables [s, 1, d / 2]; in fp32, as transformers' OLMo does."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class PackedAttention(MegatronModule):
    """Core attention of a megatron-core layer, on rows described by a PackedSequence."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.scale = softmax_scale

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
        """query [s, heads, d], key and value [s, kv heads, d] of this rank's slice -> [s, heads * d]."""
        layout = packed_seq_params
        assert layout is not None
        ranks = self.context_group.size()
        if ranks > 1:
            repeats = -(-ranks // key.shape[1]) if key.shape[1] < ranks else 1
            if repeats > 1:  # fewer key/value heads than ranks: each rank needs one, so some are sent more than once
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            query, key, value = (_SwapSequenceAndHeads.apply(x, True, self.context_group) for x in (query, key, value))
        if layout.cos is not None and layout.sin is not None:
            query, key = rotate(query, layout.cos, layout.sin), rotate(key, layout.cos, layout.sin)
        if layout.cache is not None:
            out = layout.cache.attend(self.layer_number, query, key, value, layout)
        else:
            out = attend(query, key, value, layout, self.scale)
        if ranks > 1:
            out = _SwapSequenceAndHeads.apply(out, False, self.context_group)
        return out.flatten(1)
