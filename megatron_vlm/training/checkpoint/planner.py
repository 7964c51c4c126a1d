"""How shards are written and read by torch's distributed checkpoint: its planners, for `shards.Shard`."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.shards import LocalState, Shard, StoredObject, as_bytes


def written_here(state: LocalState, data_rank: int, data_size: int) -> LocalState:
    """The part of a state that this rank writes, so that every tensor is written once and ranks write alike.

    Weights are the same on all ranks of the data x context group. They are assigned to its ranks by size, largest
    first, each to the rank that has least so far; every rank comes to the same assignment by itself.

    Args:
        state: of this rank.
        data_rank: of this rank in the data x context group.
        data_size: of that group.
    """
    ours = [shard for shard in state.shards if shard.replica[:2] == (0, 0)]
    same_everywhere = [shard for shard in ours if not shard.sharded_over_data]
    loads = [0] * data_size
    kept = [shard for shard in ours if shard.sharded_over_data and shard.replica[2] == 0]
    for shard in sorted(same_everywhere, key=lambda shard: (-shard.tensor.nbytes, shard.key, shard.offsets)):
        rank = loads.index(min(loads))
        loads[rank] += shard.tensor.nbytes
        if rank == data_rank:
            kept.append(shard)
    return LocalState(kept, [value for value in state.objects if value.replica == (0, 0, 0)])


class ShardSavePlanner(SavePlanner):
    """Writes a LocalState, whose tensors are in host memory."""

    def __init__(self, state: LocalState) -> None:
        self._shards = {_index(shard): shard for shard in state.shards}
        self._objects = {MetadataIndex(value.key): value for value in state.objects}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the state is known."""

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index, WriteItemType.SHARD, tensor_data=_describe(s)) for index, s in self._shards.items()]
        return SavePlan([*items, *(WriteItem(index, WriteItemType.BYTE_IO) for index in self._objects)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError (torch's) where boxes of a tensor overlap or leave something out."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return as_bytes(self._objects[_plain(write_item.index)].value)
        return self._shards[_plain(write_item.index)].boxed


def _index(shard: Shard) -> MetadataIndex:
    return MetadataIndex(shard.key, torch.Size(shard.offsets))


def _plain(index: MetadataIndex) -> MetadataIndex:
    """torch adds the number of the chunk, which is no part of the name."""
    return MetadataIndex(index.fqn, index.offset)


def _describe(shard: Shard) -> TensorWriteData:
    return TensorWriteData(
        chunk=_chunk(shard),
        properties=TensorProperties(shard.tensor.dtype),
        size=torch.Size(shard.global_shape),
    )


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))


class ShardLoadPlanner(LoadPlanner):
    """Reads into the tensors of a LocalState; objects go into `loaded_objects`."""

    def __init__(self, state: LocalState, source: str) -> None:
        """
        Args:
            state: what this rank holds.
            source: names the checkpoint in errors.
        """
        self._shards, self._objects, self._source = state.shards, state.objects, source
        self.loaded_objects: dict[str, Any] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Raises CheckpointError where the checkpoint lacks a tensor, or has it in another shape."""
        stored, wrong = self._metadata.state_dict_metadata, []
        items: list[ReadItem] = []
        for number, shard in enumerate(self._shards):
            found = stored.get(shard.key)
            if not isinstance(found, TensorStorageMetadata):
                wrong.append(f"{shard.key} is missing")
            elif tuple(found.size) != shard.global_shape:
                wrong.append(f"{shard.key} is {list(found.size)}, {list(shard.global_shape)} is needed")
            else:
                reads = create_read_items_for_chunk_list(shard.key, found, [_chunk(shard)])
                if sum(item.lengths.numel() for item in reads) != shard.tensor.numel():
                    wrong.append(f"{shard.key} lacks a part")
                items += [_numbered(item, number) for item in reads]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(f"{self._source} does not hold this model: {'; '.join(wrong[:5])}{more}")
        for value in self._objects:
            if value.key in stored:  # absent where it was saved with another kind of layer
                index = MetadataIndex(value.key)
                items.append(
                    ReadItem(LoadItemType.BYTE_IO, index, torch.Size((0,)), index, torch.Size((0,)), torch.Size((0,)))
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        (self.loaded_objects[read_item.dest_index.fqn],) = torch.load(value, map_location="cpu", weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        number = read_item.dest_index.index
        assert number is not None
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._shards[number].boxed[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: it was written in place."""


def _numbered(item: ReadItem, number: int) -> ReadItem:
    """The read goes into the number-th shard: several shards of a rank may be boxes of one tensor."""
    index = MetadataIndex(item.dest_index.fqn, item.dest_index.offset, number)
    return ReadItem(item.type, index, item.dest_offsets, item.storage_index, item.storage_offsets, item.lengths)


def copy_to_host(state: LocalState, kept: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> LocalState:
    """The state as it is now, in host memory of its own, so that training may continue while it is written.

    Args:
        state: what this rank writes.
        kept: buffers of the last copy, used again where they fit; pinned on a GPU.
    """
    shards = []
    for shard in state.shards:
        key = (shard.key, shard.offsets)
        buffer = kept.get(key)
        if buffer is None or buffer.shape != shard.tensor.shape or buffer.dtype != shard.tensor.dtype:
            buffer = torch.empty(
                shard.tensor.shape, dtype=shard.tensor.dtype, device="cpu", pin_memory=shard.tensor.is_cuda
            )
            kept[key] = buffer
        buffer.copy_(shard.tensor, non_blocking=True)
        shards.append(Shard(shard.key, buffer, shard.offsets, shard.global_shape, shard.replica, True))
    if any(shard.tensor.is_cuda for shard in state.shards):
        torch.cuda.synchronize()
    return LocalState(shards, [StoredObject(v.key, v.value, v.replica) for v in state.objects])
