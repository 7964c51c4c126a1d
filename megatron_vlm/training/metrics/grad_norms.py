"""The gradient norm of each model part, from the reduced gradients that a rank owns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_vlm.config import PARTS
from megatron_vlm.model.sharding import unwrap
from megatron_vlm.runtime.device import current_device


def part_squares(chunks: list[DistributedDataParallel]) -> torch.Tensor:
    """Sums of squares of this rank's gradients by model part, after forward_backward and before the update.

    Returns:
        [parts] fp64 on the device, in the order of PARTS. Their sum over all ranks of the world is the squared norm: an
        element that several ranks hold is counted on one of them.
    """
    norms: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    for chunk in chunks:
        model_part = {parameter: part for part, group in unwrap(chunk).parts().items() for parameter in group}
        for parameter, gradient in _owned_gradients(chunk):
            norms[model_part[parameter]].append(gradient)
    totals = torch.zeros(len(PARTS), dtype=torch.double, device=current_device())
    for index, gradients in enumerate(norms.values()):
        if gradients:
            totals[index] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    return totals


def _is_another_instance(bucket_group: Any) -> bool:
    """Whether an instance of the distributed optimizer with a lower number holds the same gradients."""
    instances = getattr(bucket_group, "inter_distributed_optimizer_instance_group", None)
    return instances is not None and bool(instances.rank())


def _owned_gradients(chunk: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter, flat slice of its reduced gradient) of the elements that this rank counts."""
    sharded = chunk.ddp_config.use_distributed_optimizer
    is_first_copy = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            begin, end = 0, bucket.grad_data.numel() if is_first_copy else 0
            if sharded:  # each rank has the reduced gradients of its own part of a bucket
                ranks = group.intra_distributed_optimizer_instance_group
                size = bucket.grad_data.numel() // ranks.size()
                begin, end = ranks.rank() * size, (ranks.rank() + 1) * size
                if _is_another_instance(group):
                    end = begin
            for parameter in bucket.params:
                if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)):
                    continue
                first = parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                start, stop = max(begin, first), min(end, first + parameter.numel())
                if start < stop:
                    yield parameter, bucket.grad_data[start:stop]
