"""Bytes on one rank: parameters, gradients, optimizer state, and what rows in flight keep for backward."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config import Recipe
from megatron_vlm.planner.activations import FP32, Activations, activations
from megatron_vlm.planner.balance import layers_per_stage
from megatron_vlm.planner.parameters import rank_parameters
from megatron_vlm.planner.row_work import RowShape

LOSS_CHUNK = 3 * 2**28
"""fp32 logits of a chunk of the loss head, their copy in the model's dtype and its product, at most."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank at the busiest moment of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What is kept for backward, of all rows in flight."""
    temporary: int
    """Gradients of activations, gathered sequences and logits, on a GPU."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


def rank_memory(
    recipe: Recipe, world_size: int, pipeline_rank: int, shape: RowShape | None = None, *, fused: bool = True
) -> RankMemory:
    """Memory of the ranks of one pipeline stage, for a recipe that has passed check_recipe.

    Args:
        recipe: the run.
        world_size: number of ranks.
        pipeline_rank: of the rank; ranks of one stage hold the same amount.
        shape: of a row; by default full of images.
        fused: with a GPU's kernels; False is what autograd keeps on a CPU.
    """
    parallel, training = recipe.parallel, recipe.training
    shape = shape or RowShape.of_recipe(recipe)
    parameters = rank_parameters(recipe, pipeline_rank)
    trained = parameters.trained(recipe)
    copies = parallel.data_parallel_size(world_size)
    shards = 1
    if parallel.use_distributed_optimizer:
        shards = copies * parallel.context_parallel_size // parallel.num_distributed_optimizer_instances
    state = (2 if training.optimizer == "adam" else int(training.sgd_momentum > 0)) + int(training.bf16)
    kept = activations(recipe, shape, fused=fused)
    rows = training.global_batch_size // copies
    return RankMemory(
        parameters=parameters.total * (2 if training.bf16 else FP32),
        gradients=trained * FP32,
        optimizer=-(-trained * state * FP32 // shards),
        activations=_in_flight(recipe, kept, pipeline_rank, rows),
        temporary=_temporary(recipe, shape, kept, pipeline_rank) if fused else 0,
    )


def _in_flight(recipe: Recipe, kept: Activations, rank: int, rows: int) -> int:
    """The most bytes that rows between their forward and their backward pass keep, in megatron-core's schedules."""
    stages = _stages_of(recipe, rank)
    chunks = [_chunk(recipe, kept, stage) for stage in stages]
    ranks = recipe.parallel.pipeline_model_parallel_size
    # After a few rounds, the schedule repeats itself.
    forward = _passes(ranks, len(chunks), min(rows, 4 * ranks))
    warmup = ranks - rank - 1 if len(chunks) == 1 else (ranks - rank - 1) * 2 + (len(chunks) - 1) * ranks
    now = sum(chunks[chunk] for chunk in forward[:warmup])
    peak = now
    for chunk, finished in zip(forward[warmup:], forward, strict=False):
        now += chunks[chunk]
        peak = max(peak, now)
        now -= chunks[-1 - finished]  # backward passes take the chunks in the opposite order
    return peak + max(_recomputed(recipe, kept, stage) for stage in stages)


def _passes(ranks: int, chunks: int, rows: int) -> list[int]:
    """The model chunk of each forward pass: `ranks` rows go through one chunk, then through the next."""
    if chunks == 1:
        return [0] * rows
    return [chunk for _ in range(0, rows, ranks) for chunk in range(chunks) for _ in range(ranks)]


def _stages_of(recipe: Recipe, rank: int) -> range:
    parallel = recipe.parallel
    ranks = parallel.pipeline_model_parallel_size
    return range(rank, ranks * parallel.virtual_pipeline_model_parallel_size, ranks)


def _chunk(recipe: Recipe, kept: Activations, stage: int) -> int:
    """Bytes of one row on one stage, which is a model chunk of a rank."""
    whole, recomputed = _split(recipe, stage)
    size = recomputed * kept.recomputed_layer + whole * kept.layer + kept.row
    last = recipe.parallel.pipeline_model_parallel_size * recipe.parallel.virtual_pipeline_model_parallel_size - 1
    return size + (kept.tower if stage == 0 else 0) + (kept.head if stage == last else 0)


def _split(recipe: Recipe, stage: int) -> tuple[int, int]:
    """Language layers of a stage that are kept, and those that are recomputed as a whole."""
    layers, training = layers_per_stage(recipe)[stage], recipe.training
    if training.recompute_granularity != "full":
        return layers, 0
    limit = training.recompute_num_layers
    recomputed = layers if limit is None else min(limit, layers)
    return layers - recomputed, recomputed


def _recomputed(recipe: Recipe, kept: Activations, stage: int) -> int:
    """Bytes that recomputation adds to those of the rows in flight, less those of the row that are free by then."""
    whole, recomputed = _split(recipe, stage)
    last = recipe.parallel.pipeline_model_parallel_size * recipe.parallel.virtual_pipeline_model_parallel_size - 1
    free = kept.head if stage == last else 0
    if recomputed:  # the first layers are, whose backward comes last
        free += whole * kept.layer
    in_layer = kept.layer_peak - free if whole + recomputed else 0
    in_tower = kept.tower_peak - whole * kept.layer - recomputed * kept.recomputed_layer if stage == 0 else 0
    return max(0, in_layer, in_tower)


def _temporary(recipe: Recipe, shape: RowShape, kept: Activations, rank: int) -> int:
    """The largest of a layer's gradients and the loss head's logits, and the gathered sequence."""
    parallel, language = recipe.parallel, recipe.model.language
    b = 2 if recipe.training.bf16 else FP32
    tokens = shape.tokens // parallel.context_parallel_size
    gathered = tokens * language.hidden_size * b if parallel.sequence_parallel else 0
    widest = 3 * language.intermediate_size // parallel.tensor_model_parallel_size + 4 * language.hidden_size
    is_last = rank == parallel.pipeline_model_parallel_size - 1
    return gathered + max(tokens * widest * b, LOSS_CHUNK if is_last else 0)
