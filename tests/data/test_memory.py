"""The loader's memory does not grow, neither in the training process nor in its workers."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest

from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from tests.data.helpers import make_recipe, mixed_folder, tiny_tokenizer_folder

FIRST, LAST = 2_000, 10_000
GROWTH = 6e6
"""Bytes a process may grow between the two: 750 per row. The allocator's fragmentation varies by megabytes."""


def _own_memory(loader: RowLoader) -> list[int]:
    """Unshared bytes of this process and of each worker."""
    gc.collect()
    processes = [psutil.Process(), *map(psutil.Process, loader.worker_pids)]
    return [process.memory_full_info().uss for process in processes]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["annotations", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_thousand_rows(tmp_path: Path, kind: str, workers: int) -> None:
    folder = mixed_folder(tmp_path / "data", 400)
    data = folder.write()
    if kind == "shards":
        prepare_shards([data], folder.images, tmp_path / "shards", 1, size_limit=100_000)
        data = tmp_path / "shards"
    recipe = make_recipe(data, folder.images, tiny_tokenizer_folder(tmp_path / "tokenizer"), num_workers=workers)
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    for _ in range(FIRST):
        next(loader)
    before = _own_memory(loader)
    for _ in range(LAST - FIRST):
        next(loader)
    after = _own_memory(loader)
    loader.close()
    print(f"{kind}, {workers} workers: {before} bytes after {FIRST} rows, {after} after {LAST}")
    assert len(after) == 1 + workers
    assert all(now - then < GROWTH for now, then in zip(after, before, strict=True))
