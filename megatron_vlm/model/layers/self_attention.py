"""Self-attention of a layer on packed rows: the split into heads and rotary embedding as one kernel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention

from megatron_vlm.model.layers.packed_sequence import PackedSequence
from megatron_vlm.model.layers.rotary import rotate
from megatron_vlm.runtime.device import fused, on_gpu


@fused
def _add(mixed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return mixed + bias


class _SplitAndRotate(torch.autograd.Function):
    """Keeps the rotary tables alone: neither qkv's output nor query and key from before they were rotated."""

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from megatron_vlm.model.layers.split_heads_kernel import split_and_rotate

        ctx.save_for_backward(cos, sin)
        return split_and_rotate(mixed.contiguous(), cos, sin, groups, head_dim)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        from megatron_vlm.model.layers.split_heads_kernel import split_and_rotate_backward

        return split_and_rotate_backward(*gradients, *ctx.saved_tensors), None, None, None, None


def split_heads(
    mixed: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, groups: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [s, 1, h, d], key and value [s, 1, groups, d] of qkv's output.

    Args:
        mixed: [s, 1, (h + 2 * groups) * d]; a group is some heads of query, then one of key and one of value.
        cos: [s, 1, d / 2] in fp32; query and key are rotated if there are tables.
        sin: likewise.
        groups: query groups on this tensor rank.
        head_dim: d.
    """
    if cos is None or sin is None:
        return _split(mixed, groups, head_dim)
    if on_gpu():
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _SplitAndRotate.apply(
            mixed, cos, sin, groups, head_dim
        )
        return parts
    query, key, value = _split(mixed, groups, head_dim)
    if torch.is_grad_enabled():
        # A slice of qkv would keep all of qkv until the backward pass, for the value alone.
        value = value.contiguous()
    return rotate(query, cos[:, None], sin[:, None]), rotate(key, cos[:, None], sin[:, None]), value


def _split(mixed: torch.Tensor, groups: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_group = mixed.unflatten(-1, (groups, -1))
    query, key, value = by_group.split([by_group.shape[-1] - 2 * head_dim, head_dim, head_dim], dim=-1)
    return query.flatten(-2).unflatten(-1, (-1, head_dim)), key, value


class PackedSelfAttention(SelfAttention):
    """megatron-core's, with `split_heads`.

    Context parallelism needs heads before it exchanges them for positions, and rotates afterwards. Where tensor ranks
    outnumber query groups, megatron-core gathers the groups. Both keep megatron-core's way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.splits_heads = self.core_attention.context_group.size() == 1
        self.splits_heads &= self.num_query_groups_per_partition * self.world_size == self.config.num_query_groups
        if not self.splits_heads:
            return
        self.core_attention.rotates = False
        if isinstance(self.linear_qkv, ColumnParallelLinear):
            self.linear_qkv.skip_bias_add = True

    def forward(
        self, *args: Any, packed_seq_params: PackedSequence | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As megatron-core's; `get_query_key_value_tensors` is called in it, without the row's description."""
        self._packed = packed_seq_params
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return output

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.splits_heads:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        packed = self._packed
        assert packed is not None
        mixed, bias = self.linear_qkv(hidden_states)
        if bias is not None:
            mixed = _add(mixed, bias)
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        return split_heads(mixed, packed.cos, packed.sin, groups, head_dim)
