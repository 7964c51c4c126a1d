"""Paged key/value cache for kernels that attend all requests of a step at once (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.inference.paged_kernels import PagedKernel, StepSequences
from megatron_vlm.inference.step_plan import StepPlan
from megatron_vlm.model.layers.packed_sequence import PackedSequence


@dataclass
class StepArrays:
    """What a step reads and writes in the cache, on the host. A token of padding is a request of its own in block 0."""

    written: np.ndarray
    """[s] int64, the slots of the row's tokens; slot = block * block size + offset."""
    cu_seqlens_q: np.ndarray
    """[n + 1] int32"""
    lengths: np.ndarray
    """[n] int32"""
    cu_seqlens_kv: np.ndarray
    """[n + 1] int32"""
    block_table: np.ndarray
    """[n, w] int32"""

    def of_sequences(self) -> list[np.ndarray]:
        """The tensors of StepSequences."""
        return [self.cu_seqlens_q, self.lengths, self.cu_seqlens_kv, self.block_table]


def step_arrays(plan: StepPlan, block_size: int, width: int | None = None) -> StepArrays:
    """Of a plan with n requests, padding included.

    Args:
        plan: its requests' tokens are one after the other in the row, and padding comes last.
        block_size: of the cache.
        width: columns of the block table; by default as many as the longest request has blocks.
    """
    used = sum(span.length for span in plan.spans)
    padding = len(plan.tokens) - used
    new = np.array([span.length for span in plan.spans] + [1] * padding, np.int32)
    lengths = np.array([span.context + span.length for span in plan.spans] + [1] * padding, np.int32)
    width = width or max(len(span.blocks) for span in plan.spans)
    table = np.zeros((len(new), width), np.int32)
    for row, span in enumerate(plan.spans):
        table[row, : len(span.blocks)] = span.blocks
    request = np.repeat(np.arange(len(new)), new)
    written = _slots(table, request, plan.positions, block_size)
    return StepArrays(written, _cumulative(new), lengths, _cumulative(lengths), table)


def cached_slots(arrays: StepArrays, block_size: int) -> np.ndarray:
    """[sum of the lengths] int64: where the tokens of all requests are in the cache, request by request."""
    request = np.repeat(np.arange(len(arrays.lengths)), arrays.lengths)
    position = np.arange(len(request)) - arrays.cu_seqlens_kv[request]
    return _slots(arrays.block_table, request, position, block_size)


def _slots(block_table: np.ndarray, request: np.ndarray, position: np.ndarray, block_size: int) -> np.ndarray:
    return block_table[request, position // block_size].astype(np.int64) * block_size + position % block_size


def _cumulative(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32)


class BatchedKVCache:
    """Keys and values of this rank's layers and heads in blocks of tokens; PackedSequence.cache refers to it.

    Call `start_step` before the layers run.
    """

    def __init__(self, num_blocks: int, block_size: int, kernel: PagedKernel) -> None:
        """`num_blocks` includes block 0, which padding is written to. Memory is allocated in the first step."""
        self.num_blocks, self.block_size, self.kernel = num_blocks, block_size, kernel
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Layer number -> keys and values [blocks, block size, kv heads, head dim]."""
        self._written = torch.empty(0, dtype=torch.int64)
        self._sequences: StepSequences | None = None

    def start_step(self, plan: StepPlan, device: torch.device, _: torch.dtype) -> None:
        """Copy what all layers need to the device."""
        arrays = step_arrays(plan, self.block_size)
        written, new, lengths, cumulative, table = (
            torch.from_numpy(array).to(device) for array in (arrays.written, *arrays.of_sequences())
        )
        greatest = max(span.length for span in plan.spans), int(arrays.lengths.max())
        sequences = StepSequences(new, lengths, cumulative, table, *greatest)
        if not self.kernel.reads_blocks:
            sequences.slots = torch.from_numpy(cached_slots(arrays, self.block_size)).to(device)
        self.use(written, sequences)

    def use(self, written: torch.Tensor, sequences: StepSequences) -> None:
        """In place of `start_step`: the slots [s] of the row's tokens, and the requests of the step."""
        self._written, self._sequences = written, sequences

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """Append key and value [s, kv, d] of a layer, then attend query [s, h, d] to its cached tokens: [s, h, d]."""
        assert self._sequences is not None
        if layer not in self._layers:
            shape = self.num_blocks, self.block_size, *key.shape[1:]
            # Zeros: memory that was never written may hold NaN.
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._layers[layer]
        for cached, new in ((keys, key), (values, value)):
            cached.flatten(0, 1).index_copy_(0, self._written, new)
        return self.kernel.attend(query.contiguous(), keys, values, self._sequences)
