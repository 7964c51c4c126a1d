"""Paged attention written out, and recorded operations in place of CUDA graphs: for machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_vlm.inference.paged_kernels import PagedKernel, StepSequences
from megatron_vlm.model.layers.packed_sequence import PackedSequence


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequences: StepSequences
) -> torch.Tensor:
    """What the kernels document. All shapes depend on the arguments' shapes alone, as in a CUDA graph."""
    tokens = torch.arange(len(query), dtype=torch.int32)
    request = torch.searchsorted(sequences.cu_seqlens_q, tokens, right=True) - 1
    to_the_end = sequences.cu_seqlens_q[request + 1] - tokens
    position = sequences.lengths[request] - to_the_end
    repeats = query.shape[1] // keys.shape[2]
    # Each token with all that the blocks of its request hold: [s, w * block size, h, d].
    cached, weighted = (
        x[sequences.block_table[request]].flatten(1, 2).repeat_interleave(repeats, 2) for x in (keys, values)
    )
    scores = torch.einsum("shd,skhd->shk", query, cached) * query.shape[2] ** -0.5
    later = torch.arange(cached.shape[1])[None, None] > position[:, None, None]
    return torch.einsum("shk,skhd->shd", scores.masked_fill(later, -torch.inf).softmax(-1), weighted)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence, scale: float | None = None
) -> torch.Tensor:
    """What kernels for packed rows document where a request has more keys than queries."""
    assert packed.causal and packed.cu_seqlens_q.dtype == packed.cu_seqlens_kv.dtype == torch.int32
    assert packed.cu_seqlens_q[-1] == len(query) and packed.cu_seqlens_kv[-1] == len(key)
    new, lengths = packed.cu_seqlens_q.diff().tolist(), packed.cu_seqlens_kv.diff().tolist()
    assert max(new) <= packed.max_seqlen_q and max(lengths) <= packed.max_seqlen_kv
    outputs = []
    for q, k, v in zip(query.split(new), key.split(lengths), value.split(lengths), strict=True):
        later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        mask = torch.zeros(later.shape).masked_fill(later, -torch.inf)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


PAGED = PagedKernel(paged_attention, reads_blocks=True)


class RecordedOperations:
    """In place of CudaGraphs. What is recorded, Python's numbers and the shapes included, is what is repeated."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorded = make_fx(function)()
        operations = {str(node.target) for node in recorded.graph.nodes if node.op == "call_function"}
        assert not any("local_scalar" in operation or "nonzero" in operation for operation in operations)
        self.count += 1
        repeat: Callable[[], torch.Tensor] = recorded
        return repeat
