"""Run by torchrun: load a checkpoint in parallel layouts, compare each rank's weights with it, and save it again.

    torchrun --nproc-per-node 4 resave.py LOAD SAVE TENSOR,PIPELINE[,STAGES] [TENSOR,PIPELINE[,STAGES] ...]

STAGES is a pipeline_model_parallel_layout. The last layout saves. The remaining factor of the world size is data
parallelism.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import apply_factories

from checkpoint_convert.megatron.reader import CheckpointTensors
from checkpoint_convert.megatron.writer import layer_name, slice_for_shard
from megatron_vlm.config import ParallelConfig
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import all_sharded_tensors
from megatron_vlm.model.sharding import model_sharded_state_dict
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint, save_checkpoint


def compare(chunk: VisionLanguageModel, checkpoint: Path) -> int:
    """Assert that this rank's tensors are slices of the checkpoint's, bit for bit; returns their number."""
    stored, state = CheckpointTensors(checkpoint), model_sharded_state_dict(chunk)
    apply_factories(state)
    shards = all_sharded_tensors(state)
    for shard in shards:
        name = layer_name(shard)
        assert torch.equal(shard.data.view(shard.local_shape), slice_for_shard(stored[name], shard)), name
    return len(shards)


def main(load: str, save: str, *layouts: str) -> None:
    checkpoint = require_checkpoint(load)
    with process_group():
        for layout in layouts:
            tensor, pipeline, *stages = layout.split(",")
            recipe = read_recipe(load)
            recipe.parallel = ParallelConfig(int(tensor), int(pipeline))
            recipe.parallel.pipeline_model_parallel_layout = stages[0] if stages else None
            initialize_groups(recipe.parallel)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            chunks = build_model(recipe)
            progress = load_checkpoint(checkpoint, chunks, recipe)
            count = compare(chunks[0], checkpoint)
            if layout == layouts[-1]:
                recipe.training.save = str(save)
                save_checkpoint(chunks, recipe, progress)
            print(f"tensor {tensor} x pipeline {pipeline}: {count} tensors on this rank are equal", flush=True)
            del chunks
            destroy_groups()


if __name__ == "__main__":
    main(*sys.argv[1:])
