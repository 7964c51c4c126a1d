"""Paged key/value cache of the language model (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from megatron_vlm.inference.step_plan import Span, StepPlan
from megatron_vlm.model.layers.packed_sequence import PackedSequence


class PagedKVCache:
    """Keys and values of this rank's layers and heads in blocks of tokens; PackedSequence.cache refers to it.

    Call `start_step` before the layers run. Each request is attended by itself, so its result does not depend on the
    other requests of the step.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """`num_blocks` includes block 0, which padding is written to. Memory is allocated in the first step."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Layer number -> keys and values [kv heads, slots, head dim]; slot = block * block_size + offset."""
        self._slots = torch.empty(0, dtype=torch.int64)
        """[S]: the slot each token of the row is written to."""
        self._spans: list[tuple[Span, slice | torch.Tensor]] = []
        """Each span with the slots of its tokens, cached and new ones: a slice where its blocks are contiguous."""

    def start_step(self, plan: StepPlan, device: torch.device) -> None:
        """Prepare the indices that all layers need."""
        slots = np.zeros(len(plan.tokens), np.int64)
        self._spans = []
        for span in plan.spans:
            used = self._slots_of(span)
            slots[span.start : span.start + span.length] = used[span.context :]
            first, last = int(used[0]), int(used[-1])
            contiguous = last - first + 1 == len(used) and bool((np.diff(used) == 1).all())
            where = slice(first, last + 1) if contiguous else torch.from_numpy(used).to(device)
            self._spans.append((span, where))
        self._slots = torch.from_numpy(slots).to(device)

    def _slots_of(self, span: Span) -> np.ndarray:
        blocks = np.asarray(span.blocks, np.int64)[:, None] * self.block_size
        return (blocks + np.arange(self.block_size)).reshape(-1)[: span.context + span.length]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """Append key and value [s, kv, d] of a layer, then attend query [s, h, d] to its cached tokens: [s, h, d]."""
        if layer not in self._layers:
            shape = (key.shape[1], self.num_blocks * self.block_size, key.shape[2])
            # Zeros: memory that was never written may hold NaN.
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._layers[layer]
        keys[:, self._slots], values[:, self._slots] = key.transpose(0, 1), value.transpose(0, 1)
        out = torch.zeros_like(query)
        for span, where in self._spans:
            rows = slice(span.start, span.start + span.length)
            attended = _attend_span(query[rows].transpose(0, 1), keys[:, where], values[:, where], span.context)
            out[rows] = attended.transpose(0, 1)
        return out


def _attend_span(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: int) -> torch.Tensor:
    """query [h, s, d] at positions context..context + s - 1, keys and values [kv, context + s, d] -> [h, s, d]."""
    length = query.shape[1]
    mask = None
    if length > 1 and context:
        mask = torch.ones(length, context + length, dtype=torch.bool, device=query.device).tril(context)
    out = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=length > 1 and not context,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return out[0]
