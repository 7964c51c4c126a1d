"""Paged key/value cache of the language model (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megatron_vlm.inference.step_plan import Span, StepPlan
from megatron_vlm.model.layers.packed_sequence import PackedSequence

Slots = slice | torch.Tensor
"""Positions in the cache or in a row: a slice where they are contiguous, because a CPU is faster without indices."""


@dataclass
class _Chunk:
    """Several tokens of one request in a step."""

    rows: slice
    """Of the row of the step."""
    new: slice
    """The same tokens among the request's, from 0."""
    slots: Slots
    """Of the request's tokens, cached and new ones."""
    mask: torch.Tensor | None
    """[s, context + s] to add to the scores: 0 or -inf. None without context: attention is causal."""


class PagedKVCache:
    """Keys and values of this rank's layers and heads in blocks of tokens; PackedSequence.cache refers to it.

    For CPUs, and where no kernel attends all requests at once (batched_kv_cache). Call `start_step` before the layers
    run. Each request is attended by itself, so its result does not depend on the other requests of the step. All that
    layers have in common is computed once per step, because in decode on a CPU the time of small operations counts.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """`num_blocks` includes block 0, which padding is written to. Memory is allocated in the first step."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Layer number -> keys and values [1, kv heads, slots, head dim]; slot = block * block_size + offset."""
        self._chunks: list[_Chunk] = []
        self._single: list[Slots] = []
        """For each request with one token in the step, the slots of all its tokens."""
        self._single_rows: Slots = slice(0, 0)
        """Where these tokens are in the row of the step."""
        self._written_rows: Slots = slice(0, 0)
        """These tokens and the row's padding."""
        self._written_slots = torch.empty(0, dtype=torch.int64)
        """The slots that they are written to."""

    def start_step(self, plan: StepPlan, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare what all layers need; `dtype` is that of the scores."""
        self._chunks, self._single = [], []
        rows, written, stop = [], [], 0
        for span in plan.spans:
            used = self._slots_of(span)
            slots = _contiguous(used, device)
            if span.length == 1:
                self._single.append(slots)
                rows.append(span.start)
                written.append(int(used[-1]))
            else:
                self._chunks.append(_chunk(span, slots, device, dtype))
            stop = span.start + span.length
        padding = range(stop, len(plan.tokens))
        self._written_slots = torch.tensor(written + [0] * len(padding), dtype=torch.int64, device=device)
        self._written_rows = _contiguous(np.array([*rows, *padding], np.int64), device)
        self._single_rows = _contiguous(np.array(rows, np.int64), device)

    def _slots_of(self, span: Span) -> np.ndarray:
        blocks = np.asarray(span.blocks, np.int64)[:, None] * self.block_size
        return (blocks + np.arange(self.block_size)).reshape(-1)[: span.context + span.length]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """Append key and value [s, kv, d] of a layer, then attend query [s, h, d] to its cached tokens: [s, h, d]."""
        if layer not in self._layers:
            shape = (1, key.shape[1], self.num_blocks * self.block_size, key.shape[2])
            # Zeros: memory that was never written may hold NaN.
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._layers[layer]
        out = torch.zeros_like(query)
        for chunk in self._chunks:
            for cached, new in ((keys, key), (values, value)):
                _write(cached, chunk, new[chunk.rows].transpose(0, 1))
            attended = _attend(
                query[chunk.rows].transpose(0, 1)[None],
                keys[:, :, chunk.slots],
                values[:, :, chunk.slots],
                chunk.mask,
                is_causal=chunk.mask is None,
            )
            out[chunk.rows] = attended[0].transpose(0, 1)
        if len(self._written_slots):
            for cached, new in ((keys, key), (values, value)):
                cached[0].index_copy_(1, self._written_slots, new[self._written_rows].transpose(0, 1))
        if self._single:
            queries = query[self._single_rows].unsqueeze(2).split(1)  # [1, h, 1, d] each
            attended_all = [
                _attend(one, keys[:, :, slots], values[:, :, slots])
                for one, slots in zip(queries, self._single, strict=True)
            ]
            out[self._single_rows] = torch.cat(attended_all).squeeze(2)
        return out


def _contiguous(used: np.ndarray, device: torch.device) -> Slots:
    """Positions, as a slice if they are contiguous."""
    if not len(used):
        return slice(0, 0)
    first, last = int(used[0]), int(used[-1])
    if last - first + 1 == len(used) and bool((np.diff(used) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(used).to(device)


def _chunk(span: Span, slots: Slots, device: torch.device, dtype: torch.dtype) -> _Chunk:
    length, total = span.length, span.context + span.length
    mask = None
    if span.context:
        mask = torch.full((length, total), -torch.inf, dtype=dtype, device=device).triu(span.context + 1)
    return _Chunk(slice(span.start, span.start + length), slice(span.context, total), slots, mask)


def _write(cached: torch.Tensor, chunk: _Chunk, new: torch.Tensor) -> None:
    """Write new [kv, s, d] to the slots of a chunk's tokens."""
    if isinstance(chunk.slots, slice):
        first = chunk.slots.start
        cached[0, :, first + chunk.new.start : first + chunk.new.stop] = new
    else:
        cached[0, :, chunk.slots[chunk.new]] = new


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """query [1, h, s, d], keys and values [1, kv, t, d] -> [1, h, s, d]."""
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=query.shape[1] != keys.shape[1]
    )
