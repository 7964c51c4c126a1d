"""CUDA graphs of decode: the kernels of a step in which every request has one token, launched together.

A step of a small model has hundreds of kernels, and launching them one by one takes longer than they do. A graph
repeats recorded kernels on the same memory. So its inputs are written to tensors that stay, and everything that depends
on the requests is in those.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_vlm.inference.batched_kv_cache import BatchedKVCache, step_arrays
from megatron_vlm.inference.paged_kernels import StepSequences
from megatron_vlm.inference.step_plan import StepPlan

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions [s] -> fp32 logits [s, V] of all of them; layers use the cache that was given."""
Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""A function without arguments -> one that repeats its kernels and returns the same tensor."""

_WARM_UP_STEPS = 3
"""Steps before recording: kernels are compiled, and libraries allocate their memory, when they are first used."""


class CudaGraphs:
    """Records functions as CUDA graphs, which share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """The steps in which all requests decode: a graph for each length of the row."""

    def __init__(
        self, forward: Forward, cache: BatchedKVCache, most_blocks: int, device: torch.device, record: Record
    ) -> None:
        """
        Args:
            forward: the model.
            cache: that its layers use; its kernel reads blocks.
            most_blocks: of a request.
            device: of the model.
            record: records the kernels of a function.
        """
        assert cache.kernel.reads_blocks
        self._forward, self._cache, self._width, self._device = forward, cache, most_blocks, device
        self._record = record
        self._rows: dict[int, _DecodeRow] = {}

    @staticmethod
    def can_run(plan: StepPlan) -> bool:
        """Whether each request of a step has one token, which is no image token, and wants its logits."""
        one_each = len(plan.logit_positions) == len(plan.spans) and all(span.length == 1 for span in plan.spans)
        return one_each and not plan.merge

    def run(self, plan: StepPlan) -> torch.Tensor:
        """fp32 logits [n, V] of a step's n requests, which are overwritten by the next step."""
        length = len(plan.tokens)
        if length not in self._rows:
            self._rows[length] = _DecodeRow(length, self._width, self._cache.block_size, self._device)
        row = self._rows[length]
        row.fill(plan)
        self._cache.use(row.written, row.sequences)
        return self._compute(row)[: len(plan.spans)]

    def _compute(self, row: _DecodeRow) -> torch.Tensor:
        def compute() -> torch.Tensor:
            return self._forward(row.tokens, row.positions)

        if row.steps < _WARM_UP_STEPS:
            row.steps += 1
            return compute()
        if row.replay is None:
            row.replay = self._record(compute)
        return row.replay()


class _DecodeRow:
    """The inputs of a step of one length, in memory that stays."""

    def __init__(self, length: int, width: int, block_size: int, device: torch.device) -> None:
        self._block_size, self._width = block_size, width
        self._row = _Inputs(torch.int64, [length] * 3, device)
        self.tokens, self.positions, self.written = self._row.tensors
        self._sequences = _Inputs(torch.int32, [length + 1, length, length + 1, length * width], device)
        new, lengths, cumulative, table = self._sequences.tensors
        self.sequences = StepSequences(
            new, lengths, cumulative, table.view(length, width), max_seqlen_q=1, max_seqlen_kv=width * block_size
        )
        self.steps = 0
        self.replay: Callable[[], torch.Tensor] | None = None

    def fill(self, plan: StepPlan) -> None:
        """Copy a step's inputs to the device. The last step is over, because its tokens have been read."""
        arrays = step_arrays(plan, self._block_size, self._width)
        self._row.write([plan.tokens, plan.positions, arrays.written])
        self._sequences.write(arrays.of_sequences())


class _Inputs:
    """Tensors of integers that are written together, by one copy that the host does not wait for."""

    def __init__(self, dtype: torch.dtype, sizes: list[int], device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)
        self.tensors = self._device.split(sizes)

    def write(self, arrays: list[np.ndarray]) -> None:
        np.concatenate([array.ravel() for array in arrays], out=self._host.numpy())
        self._device.copy_(self._host, non_blocking=True)
