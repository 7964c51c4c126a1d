"""Count bytes on every rank of some layouts, and what the planner says of them; results as JSON.

torchrun --nproc-per-node 4 -m tests.planner.run_memory FOLDER [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import tensor_parallel

from megatron_vlm.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
    check_recipe,
)
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch, tile_range
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.planner.memory import rank_memory
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups, parallel_ranks, tile_shard_rank
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, rows_for_chunks
from tests.support.planned_bytes import gradient_bytes, optimizer_bytes, storage_bytes, weights_of
from tests.support.saved_tensors import SavedTensors

SEQ_LENGTH, TILES = 512, 8
DOCUMENTS = (200, 130, 90, 60, 32)
"""Too different for a CPU's attention to pad them to one length, which no GPU does."""
VISION = VisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=7
)
LANGUAGE = LanguageConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=1024, max_position_embeddings=SEQ_LENGTH,
)  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "normalization": "RMSNorm", "attention_bias": True, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Case:
    """Settings of one run on four ranks, by section."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        return Recipe(
            ModelConfig(
                VISION, LanguageConfig(**(vars(LANGUAGE) | self.language)), image_token_index=1000,
                image_grid_pinpoints=[[28, 28], [56, 28]],
            ),
            DataConfig(seq_length=SEQ_LENGTH, max_tiles_per_row=TILES),
            TrainingConfig(**{"global_batch_size": 16, "lr_warmup_fraction": 0.0} | self.training),
            ParallelConfig(**self.parallel),
        )  # fmt: skip


PP4 = {"pipeline_model_parallel_size": 4}
PP2_VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP2_CP2 = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
CASES = [
    Case("dp4"),
    Case("pp4 uneven", PP4 | {"pipeline_model_parallel_layout": "E|t*3|t*3|t*2L"}),
    Case("pp2 vpp2", PP2_VPP2),
    Case("tp2 pp2, mlp", TP2_PP2, {"recompute_granularity": "selective"}),
    Case("pp4, projector", PP4, {"trainable": ["projector"]}),
    Case("pp4 bf16 grouped, full", PP4, {"bf16": True, "recompute_granularity": "full"}, GROUPED),
]
FULL_CASES = [
    Case("pp4", PP4),
    Case("tp2 pp2", TP2_PP2),
    Case("cp2 pp2", {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    Case("tp4 grouped", {"tensor_model_parallel_size": 4, "vision_parallel": "tensor"}, {}, GROUPED),
    Case("pp4 grouped, full", PP4, {"recompute_granularity": "full"}, GROUPED),
    Case("pp2 vpp2, block", PP2_VPP2, {"recompute_granularity": "full", "recompute_num_layers": 1}),
    Case("pp4, core_attn", PP4, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    Case("tp2 pp2, language", TP2_PP2, {"trainable": ["language"]}),
    Case("cp2, vision and projector", {"context_parallel_size": 2}, {"trainable": ["vision", "projector"]}),
    Case("tp2 pp2, lora", TP2_PP2, {"trainable": ["projector", "language_lora"], "lora_r": 16}),
    Case("pp4 grouped, lora of q and down", PP4,
         {"trainable": ["language_lora"], "lora_r": 32, "lora_target_modules": ["q_proj", "down_proj"]}, GROUPED),
    Case("tp4 grouped, lora, mlp", {"tensor_model_parallel_size": 4},
         {"trainable": ["language_lora"], "lora_r": 32, "recompute_granularity": "selective"}, GROUPED),
    Case("dp4 sgd", {"use_distributed_optimizer": False}, {"optimizer": "sgd"}),
    Case("tp2 bf16", {"tensor_model_parallel_size": 2}, {"bf16": True}),
]  # fmt: skip
HELD_OUT = [
    Case("tp2 cp2", TP2_CP2),
    Case("tp2 cp2 bf16 grouped", TP2_CP2 | {"vision_parallel": "tensor"}, {"bf16": True}, GROUPED),
    Case("cp4 grouped, full", {"context_parallel_size": 4}, {"recompute_granularity": "full"}, GROUPED),
    Case("pp2 vpp4", PP2_VPP2 | {"virtual_pipeline_model_parallel_size": 4}),
    Case("pp4 vpp2, auto", PP4 | {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "auto"}),
    Case("tp2 pp2 bf16, language, mlp", TP2_PP2, {"bf16": True, "trainable": ["language"],
                                                   "recompute_granularity": "selective"}),
    Case("tp2 pp2, tower recomputed", TP2_PP2, {"recompute_vision": True}),
    Case("pp2, vision, core_attn and mlp", {"pipeline_model_parallel_size": 2},
         {"trainable": ["vision"], "recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
]  # fmt: skip
"""Layouts and settings that nobody looked at while the formulas were written."""


def _row() -> PackedBatch:
    """Documents of several lengths with as many image tokens as the tiles have features; an eighth is supervised."""
    boundaries = [0]
    for length in DOCUMENTS:
        boundaries.append(boundaries[-1] + length)
    tokens = torch.arange(SEQ_LENGTH) % 990
    labels = torch.where(torch.arange(SEQ_LENGTH) % 8 == 0, tokens, IGNORE_INDEX)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    features = torch.arange(TILES * VISION.patches_per_tile)
    pixels = torch.zeros(TILES, 3, VISION.image_size, VISION.image_size, dtype=torch.uint8)
    return PackedBatch(
        tokens, labels, positions, boundaries, features, features.clone(), TILES, pixels, num_tokens=SEQ_LENGTH
    )


def _rows(recipe: Recipe) -> Iterator[PackedBatch]:
    row = _row()
    if parallel_ranks().is_first_stage:
        start, stop = tile_range(row.num_tiles, *tile_shard_rank(recipe.parallel))
        assert row.tiles is not None
        row.tiles = row.tiles[start:stop]
    return repeat(row)


def count(case: Case) -> dict[str, dict[str, int]]:
    """Train a step. Returns what was counted on this rank, and what was planned."""
    recipe = case.recipe()
    check_recipe(recipe, dist.get_world_size())
    initialize_groups(recipe.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(recipe)
    initialize_weights(chunks, recipe)
    wrapped = wrap_for_data_parallel(chunks, recipe)
    optimizer = build_optimizer(wrapped, recipe)
    weights = weights_of(chunks)
    with SavedTensors(weights) as saved:
        forward_backward(wrapped, rows_for_chunks(_rows(recipe), len(wrapped)), recipe)
    update(optimizer)
    counted = {
        "parameters": storage_bytes(weights),
        "gradients": gradient_bytes(wrapped),
        "optimizer": optimizer_bytes(optimizer, weights),
        "activations": saved.peak,
    }
    document = sum(length**2 for length in DOCUMENTS) / SEQ_LENGTH
    planned = rank_memory(
        recipe, dist.get_world_size(), parallel_ranks().pipeline,
        RowShape(SEQ_LENGTH, TILES, document, SEQ_LENGTH / 8), fused=False,
    )  # fmt: skip
    destroy_groups()
    return {"counted": counted, "planned": {name: getattr(planned, name) for name in counted}}


def main(folder: Path, names: set[str]) -> None:
    results: dict[str, Any] = {}
    with process_group(timeout_minutes=2):
        for case in (*CASES, *FULL_CASES, *HELD_OUT):
            if case.name not in names:
                continue
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, count(case))
            results[case.name] = of_ranks
        if dist.get_rank() == 0:
            (folder / "memory.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))
