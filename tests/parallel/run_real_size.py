"""Instella-VL-1B at its real size on CPUs: the gradients of one row, and one optimizer step of stage 1, on the disk.

The bytes that each of both takes are counted, beside those that the planner expects.

torchrun --nproc-per-node N -m tests.parallel.run_real_size FOLDER      N is the tensor-parallel size

FOLDER/gradients and FOLDER/stage1 get one .npy file per tensor, whatever the layout, and FOLDER/report.json the rest.
Nothing is gathered: ranks write their shards into the files.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import tensor_parallel

from benchmarks.support.instruct_samples import InstructRows
from megatron_vlm.config import Recipe, check_recipe, load_recipe
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch, tile_range
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import all_sharded_tensors, initialize_weights
from megatron_vlm.model.sharding import model_sharded_state_dict
from megatron_vlm.planner.memory import rank_memory
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups, tile_shard_rank
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss
from tests.parallel.gradients import Shard, iter_gradients
from tests.support.planned_bytes import gradient_bytes, optimizer_bytes, storage_bytes, weights_of
from tests.support.saved_tensors import SavedTensors

CONFIG = Path(__file__).parents[2] / "examples/instellavl/instruct.yaml"
SEQ_LENGTH, MIN_TOKENS, MAX_TILES = 4608, 4096, 6
_M_MMAP_THRESHOLD = -3
"""glibc's mallopt: allocations of at least so many bytes are given back to the system when they are freed."""


def real_recipe(ranks: int) -> Recipe:
    """The published model in fp32, one row per step, every layer recomputed."""
    recipe = load_recipe(CONFIG)
    recipe.parallel.tensor_model_parallel_size = ranks
    # With one data-parallel rank it shards nothing, and copies the weights into buffers of its own.
    recipe.parallel.use_distributed_optimizer = False
    recipe.data.seq_length, recipe.data.max_tiles_per_row = SEQ_LENGTH, MAX_TILES
    training = recipe.training
    training.bf16, training.global_batch_size, training.recompute_granularity = False, 1, "full"
    return recipe


def write(folder: Path, shards: Iterable[Shard]) -> None:
    """Write this rank's shards; every rank calls this with the same tensors in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape, offset, data in shards:
        path = folder / f"{name}.npy"
        if dist.get_rank() == 0 and not path.exists():
            np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        dist.barrier()
        file = np.lib.format.open_memmap(path, "r+")
        file[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data.numpy()
        file.flush()
        del file


def real_row(recipe: Recipe) -> PackedBatch:
    """The first row of the mix that is nearly full and has images."""
    rows = InstructRows(recipe.model, recipe.data.seq_length, recipe.data.max_tiles_per_row)
    packed = (rows.pack(rows.samples(number)) for number in itertools.count())
    return next(row for row in packed if row.num_tokens >= MIN_TOKENS and row.num_tiles)


def _train(recipe: Recipe, row: PackedBatch) -> tuple[list[Any], float, dict[str, Any]]:
    """The model with gradients, the loss, and what was measured."""
    initialize_groups(recipe.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    wrapped = wrap_for_data_parallel(chunks, recipe)
    weights = weights_of(wrapped)
    assert row.tiles is not None
    start, stop = tile_range(row.num_tiles, *tile_shard_rank(recipe.parallel))
    row = dataclasses.replace(row, tiles=row.tiles[start:stop])
    started = time.monotonic()
    with SavedTensors(weights) as saved:
        loss, _ = global_loss(forward_backward(wrapped, [iter([row])], recipe))
    counted = {
        "parameters": storage_bytes(weights),
        "gradients": gradient_bytes(wrapped),
        "activations": saved.peak,
    }
    lengths = [end - begin for begin, end in itertools.pairwise(row.cu_seqlens)]
    shape = RowShape(
        recipe.data.seq_length, row.num_tiles, sum(length**2 for length in lengths) / sum(lengths),
        int((row.labels != IGNORE_INDEX).sum()),
    )  # fmt: skip
    planned = rank_memory(recipe, dist.get_world_size(), 0, shape, fused=False)
    measured = {
        "loss": loss,
        "seconds": time.monotonic() - started,
        "counted": counted,
        "planned": {name: getattr(planned, name) for name in (*counted, "optimizer")},
    }
    return wrapped, loss, measured


def gradients(recipe: Recipe, row: PackedBatch, folder: Path) -> dict[str, Any]:
    """Forward and backward through all parts."""
    chunks, _, measured = _train(recipe, row)
    write(folder, iter_gradients(chunks))
    destroy_groups()
    return measured


def stage1(recipe: Recipe, row: PackedBatch, folder: Path) -> dict[str, Any]:
    """One complete optimizer step with the projector alone trained; its new weights are written."""
    recipe.training.trainable = ["projector"]
    chunks, loss, measured = _train(recipe, row)
    optimizer = build_optimizer(chunks, recipe)
    for group in optimizer.param_groups:
        group["lr"] = recipe.training.lr
    updated, norm = update(optimizer, loss)
    measured["counted"]["optimizer"] = optimizer_bytes(optimizer, weights_of(chunks))
    shards: list[Shard] = []
    for chunk in chunks:
        state = model_sharded_state_dict(chunk)
        kept = {name: entry for name, entry in state.items() if name.startswith(("projector", "image_newline"))}
        shards += [
            (t.key, tuple(t.global_shape), tuple(t.global_offset), t.data.detach()[(None,) * t.prepend_axis_num])
            for t in all_sharded_tensors(kept)
        ]
    write(folder, shards)
    destroy_groups()
    return measured | {"grad_norm": norm, "updated": updated}


def peak_bytes() -> int:
    """The most memory that this process held. ru_maxrss would include what the process that started it had held."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main(folder: Path) -> None:
    # Freed tensors of up to 32 MB would stay in the heap, among others that are in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    with process_group(timeout_minutes=60):
        recipe = real_recipe(dist.get_world_size())
        check_recipe(recipe, dist.get_world_size())
        row = real_row(recipe)
        report: dict[str, Any] = {
            "tokens": row.num_tokens,
            "tiles": row.num_tiles,
            "documents": len(row.cu_seqlens) - 1,
        }
        report["stage1"] = stage1(recipe, row, folder / "stage1")
        gc.collect()
        recipe.training.trainable = ["vision", "projector", "language"]
        report["gradients"] = gradients(recipe, row, folder / "gradients")
        peaks: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_bytes())
        report["peak_bytes"] = peaks
        if dist.get_rank() == 0:
            (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
