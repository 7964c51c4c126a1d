"""Full gradient tensors of a model in any parallel layout, under names that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_vlm.model.initialize import all_sharded_tensors
from megatron_vlm.model.sharding import model_sharded_state_dict

Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""Name, global shape, global offset, and the shard, with as many dimensions as the whole tensor."""


def _gather_reduced_buffers(chunk: Any) -> None:
    """All-gather the reduced gradients, which the distributed optimizer leaves sharded over data ranks."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            ranks = group.intra_distributed_optimizer_instance_group
            if ranks.size() > 1:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def local_gradients(chunks: list[Any]) -> list[Shard]:
    """This rank's shards of the reduced gradients, before clipping, without frozen parameters."""
    return [(name, shape, offset, data.clone()) for name, shape, offset, data in iter_gradients(chunks)]


def iter_gradients(chunks: list[Any]) -> Iterator[Shard]:
    """The same, one at a time and without a copy."""
    for chunk in chunks:
        _gather_reduced_buffers(chunk)
        state = model_sharded_state_dict(chunk)
        trainable = {id(p): p for p in chunk.parameters() if p.requires_grad}
        kept: dict[str, Any] = {}
        for name, entry in state.items():
            parameter = trainable.get(id(getattr(entry, "data", None)))
            if parameter is not None:
                entry.data = parameter.main_grad
                kept[name] = entry
        apply_factories(kept)
        yield from map(_shard, all_sharded_tensors(kept))


def _shard(tensor: ShardedTensor) -> Shard:
    data = tensor.data.detach().float()
    return tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), data[(None,) * tensor.prepend_axis_num]


def assemble(shards: list[Shard]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of all ranks. Elements without a shard stay nan; replicas must agree to 1e-5."""
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, data in shards:
        tensor = whole.setdefault(name, torch.full(shape, float("nan")))
        where = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        known = tensor[where]
        if not known.isnan().any():
            scale = float(known.norm()) + 1e-30
            difference = float((known - data).norm()) / scale
            if difference > 1e-5:
                raise AssertionError(f"two ranks hold different gradients of {name} at {offset}: {difference:.1e}")
        tensor[where] = data
    return whole


def relative_differences(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """|ours - reference| / |reference| for every tensor; nan if one side lacks it or some of its elements."""
    names = ours.keys() | reference.keys()
    differences = {}
    for name in names:
        if name not in ours or name not in reference:
            differences[name] = float("nan")
            continue
        norm = float(reference[name].norm())
        differences[name] = float((ours[name] - reference[name]).norm()) / max(norm, 1e-12)
    return differences
