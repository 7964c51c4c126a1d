"""Run by torchrun: load each family's checkpoint in several parallel layouts, compare its logits, save it.

torchrun --nproc-per-node 4 run_families.py FOLDER, which test_families.py wrote; writes FOLDER/found.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import parallel_state, tensor_parallel

from megatron_vlm.config import ParallelConfig, Recipe, check_recipe
from megatron_vlm.data.rows.batch import PackedBatch, tile_range
from megatron_vlm.model.build import build_model
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups, tile_shard_rank
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint, save_checkpoint


@torch.no_grad()
def whole_logits(model: VisionLanguageModel, batch: PackedBatch, recipe: Recipe) -> torch.Tensor:
    """[S, V] on every rank, gathered from all context and tensor ranks."""
    assert batch.tiles is not None
    start, stop = tile_range(batch.num_tiles, *tile_shard_rank(recipe.parallel))
    row = replace(batch, tiles=batch.tiles[start:stop])
    hidden = model.language_model.decode(model.embed(row), model.packed_sequence(row))
    group = parallel_state.get_context_parallel_group()
    mine = model.language_model.logits(hidden, torch.arange(len(batch.tokens) // group.size()))
    slices = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(slices, mine, group=group)
    return torch.cat(slices)


def run(folder: Path, layout: dict[str, Any]) -> float:
    """Largest difference of a logit from transformers'; saves a checkpoint in this layout."""
    recipe = read_recipe(folder / "megatron")
    recipe.parallel = ParallelConfig(**layout)
    recipe.data.seq_length = recipe.model.language.max_position_embeddings
    recipe.training.global_batch_size = dist.get_world_size()
    check_recipe(recipe, dist.get_world_size())
    initialize_groups(recipe.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(recipe)
    progress = load_checkpoint(require_checkpoint(folder / "megatron"), chunks, recipe)
    reference = torch.load(folder / "reference.pt")
    largest = (
        (whole_logits(chunks[0].eval(), PackedBatch(**reference["batch"]), recipe) - reference["logits"]).abs().max()
    )
    recipe.training.save = str(folder / "saved" / name_of(layout))
    save_checkpoint(chunks, recipe, progress)
    destroy_groups()
    return float(largest)


def name_of(layout: dict[str, Any]) -> str:
    return "_".join(f"{key.split('_')[0]}-{value}" for key, value in layout.items())


def main(folder: Path) -> None:
    cases: dict[str, list[dict[str, Any]]] = json.loads((folder / "cases.json").read_text())
    with process_group(timeout_minutes=2):
        found = {}
        for family, layouts in cases.items():
            found[family] = {name_of(layout): run(folder / family, layout) for layout in layouts}
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
