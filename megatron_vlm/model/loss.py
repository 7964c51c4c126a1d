"""The loss head: cross entropy of a row's supervised tokens, without the logits of the whole row.

fp32 logits of 32,768 tokens x 50,304 vocabulary entries take 6.6 GB, and twice that in backward. Here logits are
computed for supervised tokens only, in chunks, and the gradient of a chunk is computed in the forward pass (as in
Liger, arXiv:2410.10989). The vocabulary is sharded over tensor ranks (Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_vlm.model.layers.inference_linear import product
from megatron_vlm.runtime.fused_weight_gradient import is_supported, multiply_into

MAX_LOGITS_PER_CHUNK = 2**26
"""fp32 logits of a chunk on a rank, 256 MB: large enough for full speed, small next to the activations."""
_CHUNKS, _MIN_CHUNK = 16, 256
"""A row is divided into as many chunks, unless they would have fewer tokens: smaller matrix products are slower."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], each times its token weight if there are any.

    Shapes: hidden [n, H], weight [V / tp, H], targets [n] in 0..V-1, token_weights [n] fp32 or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor | None,
        group: dist.ProcessGroup,
        training: bool,
    ) -> torch.Tensor:
        need_hidden, need_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        buffer = _logits_buffer(len(hidden), weight)
        chunk = len(buffer)
        for start in range(0, len(hidden), chunk):
            chunk_hidden = hidden[start : start + chunk]
            losses, probabilities, normalizer, target, in_shard = _cross_entropy(
                chunk_hidden, weight, targets[start : start + chunk], group, buffer
            )
            scale = None if token_weights is None else token_weights[start : start + chunk]
            total += losses.sum() if scale is None else losses @ scale
            if need_hidden or need_weight:
                probabilities /= normalizer[:, None]
                probabilities.scatter_add_(1, target, -in_shard[:, None].float())
                if scale is not None:
                    probabilities *= scale[:, None]
                grad_logits = probabilities.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = grad_logits @ weight
                if grad_weight is not None:
                    _product(grad_weight, grad_logits.t(), chunk_hidden, add=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a product would be a second tensor as large as the output layer.
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the cross entropies of tokens, an fp32 scalar; shapes as in _ChunkedCrossEntropy.

    Its backward pass can run once: it scales in place the gradients that the forward pass has computed.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, token_weights, group, torch.is_grad_enabled())


def _logits_buffer(tokens: int, weight: torch.Tensor) -> torch.Tensor:
    """Where the fp32 logits of each chunk of so many tokens are computed, one after the other: [chunk, V / tp].

    One buffer for all: the pages of new memory would be cleared for each chunk, and two chunks be in memory at a time.
    """
    vocabulary = len(weight)
    chunk = max(1, min(tokens, MAX_LOGITS_PER_CHUNK // vocabulary, max(_MIN_CHUNK, -(-tokens // _CHUNKS))))
    return torch.empty(chunk, vocabulary, dtype=torch.float32, device=weight.device)


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool = False) -> None:
    """out = left @ right, or with `add` out += left @ right, in fp32; where torch can, without a second tensor."""
    if left.dtype == out.dtype or is_supported(left.dtype):
        multiply_into(out, left, right, add=add)
    elif add:
        out += left @ right
    else:
        out.copy_(left @ right)


def _cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of a chunk: hidden [n, H], weight [V / tp, H], targets [n], buffer [at least n, V / tp].

    Returns:
        losses [n]; probabilities [n, V / tp] in the buffer, not yet divided by normalizer [n]; targets [n, 1] in this
        rank's shard of the vocabulary; whether they are in it [n].
    """
    logits = buffer[: len(hidden)]
    _product(logits, hidden, weight.t())
    target = targets - group.rank() * len(weight)
    in_shard = (target >= 0) & (target < len(weight))
    target = target.clamp(0, len(weight) - 1)[:, None]
    logits -= _all_reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX, group)
    target_logits = _all_reduce(logits.gather(1, target)[:, 0] * in_shard, dist.ReduceOp.SUM, group)
    probabilities = logits.exp_()
    normalizer = _all_reduce(probabilities.sum(1), dist.ReduceOp.SUM, group)
    return normalizer.log() - target_logits, probabilities, normalizer, target, in_shard


def _all_reduce(values: torch.Tensor, op: Any, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


class LossHead(MegatronModule):
    """The output layer. It has a weight of its own unless that is tied to an embedding on the same stage."""

    def __init__(self, config: TransformerConfig, vocab_size: int, own_weight: bool, group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.group = group
        self.weight: torch.nn.Parameter | None = None
        if own_weight:
            shard_size = vocab_size // group.size()
            self.weight = torch.nn.Parameter(torch.empty(shard_size, config.hidden_size, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def _gather_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s / tp, 1, H] of this tensor rank -> [s, H]; backward sums the gradients of the vocabulary shards."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.group
            )
        return hidden[:, 0]

    def forward(
        self,
        hidden: torch.Tensor,
        supervised: torch.Tensor,
        targets: torch.Tensor,
        tied: torch.Tensor | None,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of the losses of supervised tokens, an fp32 scalar.

        Args:
            hidden: [s / tp, 1, H] of this tensor rank.
            supervised: [n], the supervised tokens of this context rank's slice.
            targets: [n], what they predict.
            tied: the embedding's weight [V / tp, H], used where this layer has none.
            token_weights: [n] fp32, how much each of them counts; None: 1.
        """
        weight = self.weight if self.weight is not None else tied
        assert weight is not None
        return chunked_cross_entropy(
            self._gather_sequence(hidden)[supervised], weight, targets, self.group, token_weights
        )

    @torch.no_grad()
    def token_losses(
        self, hidden: torch.Tensor, supervised: torch.Tensor, targets: torch.Tensor, tied: torch.Tensor | None
    ) -> torch.Tensor:
        """[n] fp32 losses of supervised tokens, without gradients; arguments as in `forward`."""
        weight = self.weight if self.weight is not None else tied
        assert weight is not None
        hidden, buffer = self._gather_sequence(hidden), _logits_buffer(len(supervised), weight)
        losses = [
            _cross_entropy(hidden[where], weight, chunk_targets, self.group, buffer)[0]
            for where, chunk_targets in zip(supervised.split(len(buffer)), targets.split(len(buffer)), strict=True)
        ]
        return torch.cat(losses)

    def logits(self, hidden: torch.Tensor, where: torch.Tensor, tied: torch.Tensor | None) -> torch.Tensor:
        """fp32 logits [n, V] at the positions `where` [n] of this context rank's slice, on every tensor rank."""
        weight = self.weight if self.weight is not None else tied
        assert weight is not None
        shard = product(self._gather_sequence(hidden)[where], weight).float().contiguous()
        if self.group.size() == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.group.size())]
        dist.all_gather(shards, shard, group=self.group)
        return torch.cat(shards, dim=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        if self.weight is None:
            return {}
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                tensor=self.weight,
                key=key,
                allow_shape_mismatch=True,
                prepend_offsets=sharded_offsets,
                tp_group=self.group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        }
