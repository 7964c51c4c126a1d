"""The time of a step in a parallel layout, and where it goes: work, pipeline bubble, communication, optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_vlm.config import Recipe
from megatron_vlm.planner.balance import layers_per_stage, stage_work
from megatron_vlm.planner.devices import GPUS_PER_MACHINE, SHARE_OF_GEMM, USABLE_MEMORY, Device
from megatron_vlm.planner.memory import RankMemory, rank_memory
from megatron_vlm.planner.parameters import rank_parameters
from megatron_vlm.planner.recompute import with_recompute
from megatron_vlm.planner.row_work import RowShape, RowWork, row_work


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in a step."""

    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        return self.tensor + self.context + self.pipeline + self.data


@dataclass(frozen=True)
class Estimate:
    """A recipe in one parallel layout on some GPUs."""

    recipe: Recipe
    world_size: int
    memory: RankMemory
    """Of the fullest rank."""
    bubble: float
    """Share of the time of the pipeline in which an average stage waits."""
    traffic: Traffic
    step_seconds: float
    mfu: float
    """The model's own operations over the datasheet's; recomputation does not count."""

    def fits(self, device: Device) -> bool:
        return self.memory.total <= USABLE_MEMORY * device.memory

    @property
    def tokens_per_second(self) -> float:
        """Positions of rows, on all GPUs."""
        return self.recipe.training.global_batch_size * self.recipe.data.seq_length / self.step_seconds


def row_operations(recipe: Recipe, shape: RowShape) -> float:
    """The model's own operations for a row, forward and backward, loss head included."""
    work = _work(recipe, shape, recompute=False)
    return work.tower + work.layer * recipe.model.language.num_hidden_layers + work.head


def _work(recipe: Recipe, shape: RowShape, *, recompute: bool = True) -> RowWork:
    """Work in operations, whatever costs the recipe packs its rows by."""
    data = replace(recipe.data, cost_per_token_squared=None, cost_per_token=None, cost_per_tile=None)
    return row_work(replace(recipe if recompute else with_recompute(recipe), data=data), shape)


def estimate(recipe: Recipe, world_size: int, device: Device, shape: RowShape) -> Estimate:
    """Estimate a recipe that has passed check_recipe, on `world_size` GPUs and with rows of `shape`."""
    parallel = recipe.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    split = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    rows = recipe.training.global_batch_size // parallel.data_parallel_size(world_size)
    memories = [rank_memory(recipe, world_size, rank, shape) for rank in range(stages)]

    work = stage_work(recipe, layers_per_stage(recipe), _uneven_tiles(recipe, shape))
    passes = rows + (stages - 1) / chunks
    traffic, seconds_per_row = _row_traffic(recipe, world_size, device, shape)
    data_bytes, data_seconds = _data_traffic(recipe, world_size, device)
    pipeline_seconds = passes * (max(work) / split / (SHARE_OF_GEMM * device.gemm) + seconds_per_row)
    if parallel.overlap_grad_reduce and parallel.overlap_param_gather:
        data_seconds = max(0.0, data_seconds - pipeline_seconds / rows)  # hidden behind the first and the last row
    optimizer_seconds = 2 * max(memory.optimizer + memory.gradients for memory in memories) / device.bandwidth
    seconds = pipeline_seconds + data_seconds + optimizer_seconds
    own = row_operations(recipe, shape) * recipe.training.global_batch_size
    return Estimate(
        recipe=recipe,
        world_size=world_size,
        memory=max(memories, key=lambda memory: memory.total),
        bubble=1 - rows * sum(work) / len(work) / (passes * max(work)),
        traffic=replace(
            traffic, tensor=traffic.tensor * rows, context=traffic.context * rows, pipeline=traffic.pipeline * rows,
            data=data_bytes,
        ),
        step_seconds=seconds,
        mfu=own / (seconds * world_size * device.peak),
    )  # fmt: skip


def _uneven_tiles(recipe: Recipe, shape: RowShape) -> RowWork:
    """The work of a row, where the rank with most tiles sets the pace of the vision tower."""
    parallel, work = recipe.parallel, _work(recipe, shape)
    ranks = parallel.context_parallel_size
    if parallel.vision_parallel == "data":
        ranks *= parallel.tensor_model_parallel_size
    tiles = max(shape.tiles, 1)
    return replace(work, tower=work.tower * -(-tiles // ranks) * ranks / tiles)


def _row_traffic(recipe: Recipe, world_size: int, device: Device, shape: RowShape) -> tuple[Traffic, float]:
    """Bytes that a rank of the busiest stage sends for a row, and the seconds that this takes."""
    parallel, language = recipe.parallel, recipe.model.language
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    number = 2 if recipe.training.bf16 else 4
    layers = max(sum(layers_per_stage(recipe)[rank::stages]) for rank in range(stages))
    slice_bytes = shape.tokens / context * language.hidden_size * number
    # All-gather and reduce-scatter around attention and MLP, forward and backward; gathered again for trained weights.
    collectives = 8 + 2 * ("language" in recipe.training.trainable)
    in_tensor = layers * collectives * slice_bytes * (tensor - 1) / tensor
    heads = language.head_width * (2 * language.num_attention_heads + 2 * language.num_key_value_heads) / tensor
    in_context = layers * 2 * shape.tokens / context * heads * number * (context - 1) / context
    in_pipeline = 2 * chunks * slice_bytes / tensor * (stages > 1)
    inner = device.link if tensor * context <= GPUS_PER_MACHINE else device.network
    outer = device.link if world_size <= GPUS_PER_MACHINE else device.network
    seconds = in_tensor / device.link + in_context / inner + in_pipeline / outer
    return Traffic(in_tensor, in_context, in_pipeline, 0.0), seconds


def _data_traffic(recipe: Recipe, world_size: int, device: Device) -> tuple[float, float]:
    """Bytes that a rank sends to reduce gradients and gather parameters in a step, and the seconds that this takes."""
    parallel, training = recipe.parallel, recipe.training
    stages = parallel.pipeline_model_parallel_size
    ranks = world_size // (parallel.tensor_model_parallel_size * stages)
    trained = max(rank_parameters(recipe, rank).trained(recipe) for rank in range(stages))
    gathered = (2 if training.bf16 else 4) if parallel.use_distributed_optimizer else 4
    sent = trained * (4 + gathered) * (ranks - 1) / ranks
    inside = parallel.tensor_model_parallel_size * ranks <= GPUS_PER_MACHINE
    return sent, sent / (device.link if inside else device.network)


def days(estimated: Estimate, steps: int) -> float:
    return steps * estimated.step_seconds / 86400
