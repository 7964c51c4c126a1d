"""Writes distributed checkpoints one tensor at a time.

megatron-core saves a state dict whose tensors are all in memory. Here the model is on the meta device, with names and
shapes but no memory, and torch's checkpoint writer asks for each tensor when it writes it. The files are those of
`dist_checkpointing.save`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

LAYERS = ".layers."
"""Part of a key under which the layers of a module are stacked."""


def layer_name(tensor: ShardedTensor) -> str:
    """The name of the tensor that a shard belongs to, with the layer's index: a key stands for all stacked layers."""
    if not tensor.prepend_axis_num:
        return str(tensor.key)
    return str(tensor.key).replace(LAYERS, f"{LAYERS}{tensor.global_offset[0]}.", 1)


def slice_for_shard(whole: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    """The slice of an unsharded tensor (of one layer) that `shard` holds."""
    offsets = shard.global_offset[shard.prepend_axis_num :]
    return whole[tuple(slice(start, start + size) for start, size in zip(offsets, shard.local_shape, strict=True))]


class StreamingSave(TorchDistSaveShardedStrategy):
    """A strategy for `dist_checkpointing.save` in one process that calls `value_of` for each shard in turn."""

    def __init__(self, value_of: Callable[[ShardedTensor], torch.Tensor]) -> None:
        super().__init__(backend="torch_dist", version=1)
        self.value_of = value_of

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        writer = dcp.FileSystemWriter(checkpoint_dir, thread_count=1)
        state = {f"{number}": shard for number, shard in enumerate(nested_values(sharded_state_dict))}
        with _plain_errors(), _SavePlanner(self.value_of) as planner:
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the cause of torch's CheckpointException: it wraps a full disk in an error about file positions."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        wrapped = next(iter(error.failures.values()))[0]
        cause: BaseException | None = wrapped
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or wrapped from None


class _SavePlanner(SavePlanner):
    """Plans from names and shapes; `resolve_data` returns the tensor when the writer asks for it."""

    def __init__(self, value_of: Callable[[ShardedTensor], torch.Tensor]) -> None:
        self.value_of = value_of
        self.shards: dict[MetadataIndex, ShardedTensor | ShardedObject] = {}

    def __enter__(self) -> _SavePlanner:
        self.bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        for shard in state_dict.values():
            if isinstance(shard, ShardedTensor):
                self.shards[MetadataIndex(shard.key, shard.global_offset)] = shard
            else:
                self.shards[MetadataIndex(shard.unique_key)] = shard

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(index, shard) for index, shard in self.shards.items()]
        self.bar.total = sum(s.data.nbytes for s in self.shards.values() if isinstance(s, ShardedTensor))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        shard = self.shards[write_item.index]
        if isinstance(shard, ShardedObject):
            buffer = io.BytesIO()
            torch.save([shard.data], buffer)  # megatron-core stores a key's objects as a list
            return buffer
        value = self.value_of(shard).to(shard.dtype)
        self.bar.update(value.nbytes)
        return value[(None,) * shard.prepend_axis_num]


def _write_item(index: MetadataIndex, shard: ShardedTensor | ShardedObject) -> WriteItem:
    if isinstance(shard, ShardedObject):
        return WriteItem(index, WriteItemType.BYTE_IO)
    sizes = torch.Size((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(shard.global_offset), sizes),
        properties=TensorProperties(shard.dtype),
        size=torch.Size(shard.global_shape),
    )
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
