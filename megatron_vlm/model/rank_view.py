"""Which part of every row this rank computes with."""

from __future__ import annotations

from megatron.core import parallel_state

from megatron_vlm.config import Recipe
from megatron_vlm.data.rows.rank_batch import RankView
from megatron_vlm.model.layers.attention_backend import choose_attention
from megatron_vlm.runtime.process_groups import tile_shard_rank


def rank_view(recipe: Recipe) -> RankView:
    """The view of this process; process groups must exist."""
    vision = recipe.model.vision
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    _, tile_ranks = tile_shard_rank(recipe.parallel)
    return RankView(
        is_first_stage=stage == 0,
        is_last_stage=stage == parallel_state.get_pipeline_model_parallel_world_size() - 1,
        context=(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()),
        sequence=(parallel_state.get_tensor_model_parallel_rank(), tensor_ranks),
        tile_ranks=tile_ranks,
        tower_sequence_ranks=tensor_ranks if recipe.parallel.vision_parallel == "tensor" else 1,
        tokens_per_tile=vision.tokens_per_tile,
        patches_per_tile=vision.patches_per_tile,
        groups_documents=choose_attention(recipe, "language").reads_groups,
        groups_tiles=choose_attention(recipe, "vision").reads_groups,
        loss_normalization=recipe.training.loss_normalization,
    )
