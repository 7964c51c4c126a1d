"""Full gradient tensors of a model in any layout, under layout-independent names."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_vlm.model.initialize import all_sharded_tensors
from megatron_vlm.model.sharding import model_sharded_state_dict

Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""Name, global shape, global offset, and the shard [1, ..., local shape] as it lies in the whole tensor."""


def _gather_reduced_buffers(chunk: Any) -> None:
    """The distributed optimizer leaves each data rank with its share of the reduced gradients: share them all."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            ranks = group.intra_distributed_optimizer_instance_group
            if ranks.size() > 1:
                share = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=ranks)


def local_gradients(chunks: list[Any]) -> list[Shard]:
    """This rank's shards of the finished gradients (before clipping), frozen parameters left out."""
    shards: list[Shard] = []
    for chunk in chunks:
        _gather_reduced_buffers(chunk)
        state = model_sharded_state_dict(chunk)
        trained = {id(p): p for p in chunk.parameters() if p.requires_grad}
        kept: dict[str, Any] = {}
        for name, entry in state.items():
            parameter = trained.get(id(getattr(entry, "data", None)))
            if parameter is not None:
                entry.data = parameter.main_grad
                kept[name] = entry
        apply_factories(kept)
        shards += [_shard(tensor) for tensor in all_sharded_tensors(kept)]
    return shards


def _shard(tensor: ShardedTensor) -> Shard:
    data = tensor.data.detach().float().clone()
    return tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), data[(None,) * tensor.prepend_axis_num]


def assemble(shards: list[Shard]) -> dict[str, torch.Tensor]:
    """Whole tensors from everybody's shards. A place nobody holds stays nan; copies must agree bit for bit nearly."""
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, data in shards:
        tensor = whole.setdefault(name, torch.full(shape, float("nan")))
        place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        known = tensor[place]
        if not known.isnan().any():
            scale = float(known.norm()) + 1e-30
            apart = float((known - data).norm()) / scale
            if apart > 1e-5:
                raise AssertionError(f"two ranks hold different gradients of {name} at {offset}: {apart:.1e}")
        tensor[place] = data
    return whole


def relative_differences(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """|ours - reference| / |reference| for every tensor; nan where one side lacks it or a part of it."""
    names = ours.keys() | reference.keys()
    differences = {}
    for name in names:
        if name not in ours or name not in reference:
            differences[name] = float("nan")
            continue
        norm = float(reference[name].norm())
        differences[name] = float((ours[name] - reference[name]).norm()) / max(norm, 1e-12)
    return differences
