"""What this rank holds of a checkpoint's tensors: boxes of the model's weights and of the optimizer's state.

megatron-core describes the weights; the boxes of the distributed optimizer's state are worked out here. A data-parallel
rank owns a flat range of each parameter's state. Such a range is at most a few boxes of the parameter's shape, so that
every rank writes and reads its own share: nothing is gathered. On disk the tensors have the names and shapes of
megatron-core's `fully_reshardable` format and load in any layout.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vlm.model.sharding import CHECKPOINT_FORMAT, model_sharded_state_dict, sharding_metadata

OPTIMIZER_PREFIX = "optimizer.state"
CHECKPOINT_MARKER = {"param_state_sharding_type": CHECKPOINT_FORMAT["distrib_optim_sharding_type"]}
"""How megatron-core knows the format of the tensors that belong to a state dict."""


@dataclass(frozen=True)
class Shard:
    """A box of one tensor of the checkpoint."""

    key: str
    tensor: torch.Tensor
    """[sizes] this rank's values, a view of the live tensor: loading writes into it."""
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor, with leading axes (stacked layers) that `tensor` does not have."""
    global_shape: tuple[int, ...]
    replica: tuple[int, int, int]
    """(pipeline and expert, tensor, data) number of this copy: copies with the first two 0 share the writing."""
    sharded_over_data: bool
    """Whether data-parallel ranks hold different boxes (optimizer state), or all hold this one (weights). Of several
    copies of the former, the one with data number 0 is written.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the box, leading axes of size 1 included."""
        return (1,) * (len(self.global_shape) - self.tensor.ndim) + tuple(self.tensor.shape)

    @property
    def boxed(self) -> torch.Tensor:
        """The values with the leading axes."""
        return self.tensor[(None,) * (len(self.global_shape) - self.tensor.ndim)]


@dataclass
class StoredObject:
    """Something that is no tensor and belongs to a module, such as the scales of an FP8 layer."""

    key: str
    value: Any
    replica: tuple[int, int, int]


@dataclass
class LocalState:
    """Everything this rank writes or reads."""

    shards: list[Shard]
    objects: list[StoredObject]

    @property
    def num_bytes(self) -> int:
        return sum(shard.tensor.nbytes for shard in self.shards)


def model_state(chunks: list[Any]) -> LocalState:
    """The weights of this rank's model chunks."""
    state = LocalState([], [])
    for chunk in chunks:
        _add(state, model_sharded_state_dict(chunk))
    return state


@dataclass
class OptimizerState(LocalState):
    """The optimizer's state on this rank."""

    members: list[Any]
    """The state dict of each of megatron-core's chained optimizers; sharded tensors are in those not distributed."""

    @property
    def common(self) -> dict[Any, Any]:
        """What is the same on every rank (parameter groups, steps), nested as megatron-core does it."""
        members = [_without_tensors(member) for member in self.members]
        return members[0] if len(members) == 1 else dict(enumerate(members))

    def merged(self, common: dict[Any, Any]) -> list[Any]:
        """State dicts to load into the members: `common` from a checkpoint, with tensors that were read in place."""
        members = [common] if len(self.members) == 1 else [common[number] for number in range(len(self.members))]
        return [_merge(own, _without_markers(stored)) for own, stored in zip(self.members, members, strict=True)]


def chained(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that a MegatronOptimizer is made of."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def optimizer_state(optimizer: MegatronOptimizer, chunks: list[Any], *, loading: bool) -> OptimizerState:
    """
    Args:
        optimizer: of the chunks. Where `loading` is set, its state is allocated if it was not.
        chunks: of this rank, wrapped or not.
        loading: whether the tensors are going to be filled.
    """
    state = OptimizerState([], [], [])
    members = chained(optimizer)
    for number, member in enumerate(members):
        prefix = f"chained_{number}." if len(members) > 1 else ""
        if isinstance(member, DistributedOptimizer):
            state.members.append({**member.state_dict(), **CHECKPOINT_MARKER})
            if loading:
                member.load_state_dict(member.state_dict())  # allocates what the first step would
            state.shards.extend(_distributed_shards(member, chunks, prefix))
        else:
            if loading and member.init_state_fn is None:
                member.init_state_fn = _allocate_momentum
            model = {f"chunk{i}": model_sharded_state_dict(chunk) for i, chunk in enumerate(chunks)}
            state.members.append(member.sharded_state_dict(model, is_loading=loading, metadata=sharding_metadata()))
            _add(state, state.members[-1])
    return state


def _allocate_momentum(sgd: torch.optim.Optimizer, config: Any = None) -> None:
    """What the first step of SGD would allocate; megatron-core knows it for Adam alone."""
    for group in sgd.param_groups:
        for parameter in group["params"]:
            if group.get("momentum"):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _add(state: LocalState, sharded: Any) -> None:
    for value in nested_values(sharded):
        if isinstance(value, ShardedObject):
            state.objects.append(StoredObject(value.unique_key, value.data, _replica(value)))
        elif isinstance(value, ShardedTensorFactory | ShardedTensor):
            state.shards.extend(_shard(part) for part in _built(value))


def _built(value: ShardedTensorFactory | ShardedTensor) -> Iterator[ShardedTensor]:
    """A weight that is stored in pieces, such as gate and up of SwiGLU, as its pieces."""
    yield from nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]


def _replica(value: Any) -> tuple[int, int, int]:
    replica = value.replica_id
    if isinstance(replica, int):
        return (0, 0, replica)
    return (sum(replica[:-2]), replica[-2], replica[-1])


def _shard(tensor: ShardedTensor) -> Shard:
    return Shard(
        tensor.key,
        tensor.data.detach(),
        tuple(tensor.global_offset),
        tuple(tensor.global_shape),
        _replica(tensor),
        False,
    )


_NOT_COMMON = (ShardedTensor, ShardedTensorFactory, ShardedObject, LocalNonpersistentObject)


def _without_tensors(whole: Any) -> Any:
    """A sharded state without what belongs to one rank."""
    if isinstance(whole, dict):
        return {name: _without_tensors(value) for name, value in whole.items() if not isinstance(value, _NOT_COMMON)}
    if isinstance(whole, list):
        return [_without_tensors(value) for value in whole if not isinstance(value, _NOT_COMMON)]
    return whole


def _without_markers(stored: dict[str, Any]) -> dict[str, Any]:
    """Our tensors are filled in place; megatron-core must not look for them in the state dict."""
    return {name: value for name, value in stored.items() if not name.startswith("param_state")}


def _merge(own: Any, stored: Any) -> Any:
    """`own` with its plain values replaced by those of `stored`, and sharded tensors by the tensors themselves."""
    if isinstance(own, ShardedTensor | ShardedTensorFactory | ShardedObject):
        return own.data
    if isinstance(own, LocalNonpersistentObject):
        return own.unwrap()
    if isinstance(own, dict) and isinstance(stored, dict):
        merged = {name: _merge(value, stored.get(name)) for name, value in own.items() if name not in CHECKPOINT_MARKER}
        return merged | {name: value for name, value in stored.items() if name not in own}
    if isinstance(own, list) and isinstance(stored, list) and len(own) == len(stored):
        return [_merge(*pair) for pair in zip(own, stored, strict=True)]
    if isinstance(own, list | dict) and not stored:  # only tensors in it: nothing of it was stored beside them
        return (
            [_merge(value, None) for value in own]
            if isinstance(own, list)
            else {k: _merge(v, None) for k, v in own.items()}
        )
    return stored


def _distributed_shards(optimizer: DistributedOptimizer, chunks: list[Any], prefix: str) -> Iterator[Shard]:
    # Instances of the distributed optimizer hold the same state, and take turns in writing it.
    turn, instances = (
        optimizer.distributed_optimizer_instance_id,
        optimizer.ddp_config.num_distributed_optimizer_instances,
    )
    described = {}
    for chunk in chunks:
        for value in nested_values(model_sharded_state_dict(chunk)):
            if isinstance(value, ShardedTensorFactory | ShardedTensor):
                described[value.data] = value
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, owned in bucket["param_map"].items():
                    turn += 1
                    whole = _on_meta(described[parameter])
                    start, end = owned["param"].start, owned["param"].end
                    for name, values in optimizer._get_main_param_and_optimizer_states(parameter).items():
                        if isinstance(values, torch.Tensor) and values.ndim:
                            key = f"{prefix}{OPTIMIZER_PREFIX}.{name}"
                            yield from _boxes(whole, values.detach().view(-1), start, end, key, turn % instances)


def _on_meta(described: ShardedTensorFactory | ShardedTensor) -> list[ShardedTensor]:
    """The pieces of a parameter as views of one tensor without memory: a view's storage offset says where it begins."""
    return list(_built(replace(described, data=torch.empty_like(described.data, device="meta"))))


def _boxes(
    pieces: list[ShardedTensor], values: torch.Tensor, start: int, end: int, key: str, copy: int
) -> Iterator[Shard]:
    """The flat range [start, end) of a parameter, whose values are `values`, as boxes; `copy` numbers equal ranges."""
    for piece in pieces:
        begin = piece.data.storage_offset()
        first, last = max(start, begin), min(end, begin + piece.data.numel())
        if first >= last:
            continue
        for corner, sizes, flat in split_into_boxes(tuple(piece.data.shape), first - begin, last - begin):
            origin = piece.global_offset
            leading = len(origin) - len(corner)
            at = begin + flat - start
            yield Shard(
                f"{key}.{piece.key}",
                values[at : at + prod(sizes)].view(sizes),
                (*origin[:leading], *(a + b for a, b in zip(origin[leading:], corner, strict=True))),
                tuple(piece.global_shape),
                (*_replica(piece)[:2], copy),
                True,
            )


def split_into_boxes(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The range [start, end) of a tensor's elements in row-major order, as boxes: at most 2 * ndim - 1 of them.

    Yields:
        (corner, sizes, index of the first element) of each box, in order.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,), start) if shape else ((), (), 0)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows [first, last)
    if first > last:  # inside one row
        yield from _inside_row(shape, start // row, start, end)
        return
    if start < first * row:
        yield from _inside_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    if last * row < end:
        yield from _inside_row(shape, last, last * row, end)


def _inside_row(
    shape: tuple[int, ...], index: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    base = index * prod(shape[1:])
    for corner, sizes, flat in split_into_boxes(shape[1:], start - base, end - base):
        yield (index, *corner), (1, *sizes), base + flat


def as_bytes(value: Any) -> io.BytesIO:
    """An object as megatron-core stores it: all objects of a key in one list."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    buffer.seek(0)
    return buffer
