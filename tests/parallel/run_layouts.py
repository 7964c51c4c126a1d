"""Run all parallel layouts of this world size in one launch, and compare each with one process.

torchrun --nproc-per-node N run_layouts.py FOLDER            all layouts of one world size, to FOLDER/world_N.json
torchrun --nproc-per-node N run_layouts.py FOLDER --full     those that only `make test-full` runs
torchrun --nproc-per-node N run_layouts.py FOLDER NAME ...   the layouts of these names
python run_layouts.py FOLDER ...                             the references, to FOLDER/*.pt, then as above
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import tensor_parallel

from megatron_vlm.config import Recipe, check_recipe
from megatron_vlm.config.training import LORA_MODULES
from megatron_vlm.data.rows.rank_batch import rank_batch
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import all_sharded_tensors, initial_value, initialize_weights
from megatron_vlm.model.layers.lora import is_adapter
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.model.sharding import model_sharded_state_dict
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups, parallel_ranks, tile_shard_rank
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.metrics.grad_norms import part_squares
from megatron_vlm.training.optimizer import build_optimizer, synchronize_parameters, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss, rows_for_chunks
from megatron_vlm.training.validation import dataset_losses
from tests.parallel.gradients import assemble, local_gradients, relative_differences
from tests.parallel.layouts import FULL_LAYOUTS, LAYOUTS, Layout
from tests.parallel.rows import rows_of, tiny_recipe

STEPS = 3


def run(layout: Layout, break_gradient_of: str | None = None) -> list[dict[str, Any]]:
    """Train STEPS steps in `layout`. Returns each step's loss, gradient norm and, on rank 0, full gradients."""
    recipe = tiny_recipe(
        layout.parallel(),
        layout.family,
        optimizer=layout.optimizer,
        trainable=list(layout.trainable),
        lora_r=6,
        lora_alpha=9.0,
        lora_target_modules=list(layout.lora or LORA_MODULES),
        bf16=layout.bf16,
        recompute_granularity=layout.recompute,
        recompute_modules=list(layout.modules) or None,
        recompute_num_layers=layout.recompute_layers,
        loss_normalization=layout.loss,
        global_batch_size=layout.batch,
    )
    check_recipe(recipe, dist.get_world_size())
    initialize_groups(recipe.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    _fill_adapters(chunks, recipe)
    frozen = [(p, p.detach().clone()) for chunk in chunks for p in chunk.parameters() if not p.requires_grad]
    wrapped = wrap_for_data_parallel(chunks, recipe)
    optimizer = build_optimizer(wrapped, recipe)
    ranks = parallel_ranks()
    tile_shard = tile_shard_rank(recipe.parallel) if ranks.is_first_stage else None
    rows = rows_for_chunks(rows_of(ranks.data, ranks.data_size, tile_shard, layout.rows), len(chunks))
    steps = []
    for _ in range(STEPS):
        totals = forward_backward(wrapped, rows, recipe)
        loss, loss_tokens = global_loss(totals)
        squares = part_squares(wrapped)
        dist.all_reduce(squares)
        shards = local_gradients(wrapped)
        shards = [(*s[:3], s[3] / 2) if s[0] == break_gradient_of else s for s in shards]
        all_shards: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(shards, all_shards)
        _, norm = update(optimizer)
        gradients = assemble([s for rank in all_shards for s in rank]) if all_shards else {}
        steps.append({"loss": loss, "loss_tokens": loss_tokens, "grad_norm": norm, "gradients": gradients})
        steps[-1]["part_norms"] = squares.sqrt().tolist()
    steps[-1]["buckets"] = min(sum(len(group.buckets) for group in chunk.bucket_groups) for chunk in wrapped)
    synchronize_parameters(wrapped)
    per_rank = recipe.training.global_batch_size // ranks.data_size
    view = replace(rank_view(recipe), by_dataset=True)
    again = rows_of(ranks.data, ranks.data_size, tile_shard, layout.rows)
    rows_by_dataset = (rank_batch(row, view) for row in again)
    evaluated = rows_for_chunks(rows_by_dataset, len(chunks))
    steps[-1]["evaluation"] = dataset_losses(wrapped, evaluated, recipe, per_rank, datasets=2).tolist()
    steps[-1]["frozen_changed"] = sum(not torch.equal(p, before) for p, before in frozen)
    destroy_groups()
    return steps


def _fill_adapters(chunks: list[Any], recipe: Recipe) -> None:
    """Give B random values: with the zeros that it begins with, an adapter adds nothing and A has no gradient."""
    for tensor in all_sharded_tensors([model_sharded_state_dict(chunk) for chunk in chunks]):
        if is_adapter(tensor.key) and tensor.key.endswith(".B"):
            with torch.no_grad():
                tensor.data.copy_(initial_value(replace(tensor, key=f"{tensor.key}.weight"), recipe) / 4)


def reference_name(layout: Layout) -> str:
    """File of the reference, which layouts with the same model, optimizer, trainable parts and rows share."""
    return f"reference_{layout.reference().name}.pt"


def compare(steps: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of each kind; of gradients, with its tensor and step."""
    worst: dict[str, Any] = {"gradient": (0.0, "", -1), "loss": 0.0, "grad_norm": 0.0, "first_step": 0.0}
    for step, (ours, theirs) in enumerate(zip(steps, reference, strict=True)):
        differences = relative_differences(ours["gradients"], theirs["gradients"])
        for name, difference in differences.items():
            if not difference <= worst["gradient"][0]:  # also if it is nan
                worst["gradient"] = (difference, name, step)
        worst["tensors"] = len(differences)
        worst["first_step"] = worst["gradient"][0] if step == 0 else worst["first_step"]
        for key in ("loss", "grad_norm"):
            difference = abs(ours[key] - theirs[key])
            worst[key] = max(worst[key], difference / abs(theirs[key]) if theirs[key] else difference)
        norms = zip(ours["part_norms"], theirs["part_norms"], strict=True)
        together = sum(norm**2 for norm in ours["part_norms"]) ** 0.5
        worst["part_norms"] = max(
            worst.get("part_norms", 0.0),
            abs(together - ours["grad_norm"]) / max(ours["grad_norm"], 1e-9),
            *(abs(mine - other) / max(other, 1e-9) for mine, other in norms),
        )
        worst["same_tokens"] = ours["loss_tokens"] == theirs["loss_tokens"]
    pairs = zip(sum(steps[-1]["evaluation"], []), sum(reference[-1]["evaluation"], []), strict=True)
    worst["evaluation"] = max(abs(ours - theirs) / max(abs(theirs), 1e-9) for ours, theirs in pairs)
    worst |= {key: steps[-1][key] for key in ("frozen_changed", "buckets")}
    return worst


def _chosen(selection: set[str]) -> dict[int, list[Layout]]:
    if not selection:
        return LAYOUTS
    if selection == {"--full"}:
        return FULL_LAYOUTS
    return {
        ranks: [layout for layout in (*layouts, *FULL_LAYOUTS[ranks]) if layout.name in selection]
        for ranks, layouts in LAYOUTS.items()
    }


def main(folder: Path, selection: set[str]) -> None:
    """Run the layouts of this world size that `selection` chooses: see this module's docstring."""
    chosen = _chosen(selection)
    with process_group(timeout_minutes=2):
        world = dist.get_world_size()
        if world == 1:
            for name, alone in {reference_name(c): c.reference() for cases in chosen.values() for c in cases}.items():
                torch.save(run(alone), folder / name)
        results: dict[str, Any] = {}
        for layout in chosen[world]:
            started = time.monotonic()
            steps = run(layout)
            gc.collect()  # models hold process groups in reference cycles; gloo's threads end with the last reference
            if dist.get_rank() == 0:
                reference = torch.load(folder / reference_name(layout))
                results[layout.name] = compare(steps, reference)
                print(f"{layout.name}: {results[layout.name]} ({time.monotonic() - started:.1f} s)", flush=True)
        if world == 2 and not selection:
            steps = run(Layout(tp=2), break_gradient_of="projector.linear_1.weight")
            if dist.get_rank() == 0:
                results["broken"] = compare(steps, torch.load(folder / reference_name(Layout())))
        if dist.get_rank() == 0:
            (folder / f"world_{world}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))
