"""How many language layers each pipeline stage gets, so that stages take about the same time.

The slowest stage sets the pace of a pipeline. The first stage also has the vision tower, which costs as much as several
language layers, and the last one has the loss head.
"""

from __future__ import annotations

from megatron_vlm.config import Recipe
from megatron_vlm.config.pipeline_layout import AUTO, parse_layout
from megatron_vlm.planner.row_work import RowWork, row_work


def layers_per_stage(recipe: Recipe) -> list[int]:
    """Language layers of each of the PP x VPP stages of a recipe that has passed check_recipe, in order."""
    parallel, layers = recipe.parallel, recipe.model.language.num_hidden_layers
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    layout = parallel.pipeline_model_parallel_layout
    if layout == AUTO:
        return balanced_stages(row_work(recipe), layers, ranks, chunks)
    return parse_layout(layout) if layout is not None else [layers // (ranks * chunks)] * (ranks * chunks)


def balanced_stages(work: RowWork, layers: int, ranks: int, chunks: int) -> list[int]:
    """The layers of each stage that minimise the work of the busiest rank; of the first and last stage perhaps 0.

    Layers are given one by one to the rank that has the least to do. Within a rank they go to its chunk with the least.
    """
    stages = ranks * chunks
    fixed = [0.0] * stages
    fixed[0] += work.tower
    fixed[-1] += work.head
    inner = [stage for stage in range(stages) if 0 < stage < stages - 1]
    counts = [int(stage in inner) for stage in range(stages)]  # only the first and the last may be without

    def load(stage: int) -> float:
        return fixed[stage] + counts[stage] * work.layer

    for _ in range(layers - len(inner)):
        # Of equals the later rank: earlier ones keep more rows in flight, so that a layer takes more memory there.
        rank = min(range(ranks), key=lambda r: (sum(load(stage) for stage in range(r, stages, ranks)), -r))
        counts[min(range(rank, stages, ranks), key=lambda stage: (load(stage), -stage))] += 1
    return counts


def stage_work(recipe: Recipe, layers: list[int], work: RowWork | None = None) -> list[float]:
    """The work of a row on each pipeline rank, over all of its chunks."""
    work = work or row_work(recipe)
    per_stage = [count * work.layer for count in layers]
    per_stage[0] += work.tower
    per_stage[-1] += work.head
    ranks = recipe.parallel.pipeline_model_parallel_size
    return [sum(per_stage[rank::ranks]) for rank in range(ranks)]
