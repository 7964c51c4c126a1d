"""A batch that a worker sends through its queue arrives unchanged."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.data.rows.rank_batch import RankBatch, rank_batch
from megatron_vlm.data.rows.worker_transport import SharedBatch
from tests.data.helpers import tiny_model, view_of


def batch(tiles: torch.Tensor | None) -> PackedBatch:
    ids = torch.arange(12)
    return PackedBatch(
        ids, ids + 1, ids % 5, [0, 5, 12], ids[3:5], torch.tensor([0, -1]), 3, tiles, ["a", "b"], 11, row_index=7,
        bilinear_weights=torch.full((2, 4), 0.25),
    )  # fmt: skip


TILES = {
    "several": torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8),
    "a slice of a tensor": torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)[1:3],
    "no tile on this rank": torch.empty(0, 3, 8, 8, dtype=torch.uint8),
    "not encoded by this rank": None,
}


def rank_part() -> RankBatch:
    """A row with groups of documents, one of which is gathered."""
    return rank_batch(replace(batch(TILES["several"]), cu_seqlens=[0, 5, 11, 12]), view_of(tiny_model()))


def _send(queue: Any, done: Any) -> None:
    for tiles in TILES.values():
        queue.put(SharedBatch(batch(tiles)))
    queue.put(SharedBatch(rank_part()))
    done.wait()  # as torch's workers do: the receiver opens the files through this process


@pytest.fixture(scope="module")
def received() -> Iterator[dict[str, PackedBatch]]:
    context = multiprocessing.get_context("fork")
    queue, done = context.Queue(), context.Event()
    worker = context.Process(target=_send, args=(queue, done))
    worker.start()
    found = {name: queue.get(timeout=60) for name in [*TILES, "rank's part"]}
    done.set()
    worker.join()
    yield found


@pytest.mark.parametrize("name", TILES)
def test_all_fields_arrive(received: dict[str, PackedBatch], name: str) -> None:
    arrived, expected = received[name], batch(TILES[name])
    assert isinstance(arrived, PackedBatch)
    for item in fields(PackedBatch):
        value, wanted = getattr(arrived, item.name), getattr(expected, item.name)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(value, wanted) and value.dtype == wanted.dtype, item.name
        else:
            assert value == wanted, item.name


def test_a_ranks_part_arrives_with_what_is_nested_in_it(received: dict[str, Any]) -> None:
    arrived, expected = received["rank's part"], rank_part()
    assert isinstance(arrived, RankBatch) and arrived.sample_ids == ["a", "b"]
    assert _tensors(arrived).keys() == _tensors(expected).keys() >= {"documents.groups.0.gather", "supervised"}
    for name, tensor in _tensors(expected).items():
        assert torch.equal(_tensors(arrived)[name], tensor) and _tensors(arrived)[name].dtype == tensor.dtype, name


def _tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Dotted name -> tensor, for all tensors in a dataclass or list."""
    if isinstance(value, torch.Tensor):
        return {name[1:]: value}
    items = (
        [(item.name, getattr(value, item.name)) for item in fields(value)]
        if is_dataclass(value)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return {key: tensor for part, inner in items for key, tensor in _tensors(inner, f"{name}.{part}").items()}


def test_tensors_can_be_written_and_outlive_the_worker(received: dict[str, PackedBatch]) -> None:
    tiles = received["several"].tiles
    assert tiles is not None
    tiles += 1
    assert torch.equal(tiles, TILES["several"] + 1)
    tiles -= 1


def test_files_are_closed_with_their_tensors(received: dict[str, PackedBatch]) -> None:
    assert len(_tile_files()) == 3
    received.clear()
    assert not _tile_files()


def _tile_files() -> list[str]:
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue  # the descriptor that listdir itself used
    return [link for link in links if "memfd:tiles" in link]
