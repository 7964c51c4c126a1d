"""Sizes of the engine: what its settings mean for a model on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state

from megatron_vlm.config import InferenceConfig, Recipe
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import free_device_memory, on_gpu

_TOKENS_ON_GPU, _TOKENS_ON_CPU = 2048, 512
_SHARE_OF_FREE_MEMORY = 0.8
"""For the cache of a GPU; the rest is for what a step computes, images included."""
_CACHE_BYTES_ON_CPU = 2 * 2**30


def max_sequence_length(recipe: Recipe, config: InferenceConfig) -> int:
    """Prompt and generated tokens of a request at most."""
    return config.inference_max_seq_length or recipe.model.language.max_position_embeddings


def tokens_per_step(config: InferenceConfig) -> int:
    """Tokens of one step at most."""
    default = _TOKENS_ON_GPU if on_gpu() else _TOKENS_ON_CPU
    return config.inference_dynamic_batching_max_tokens or max(default, config.inference_max_requests)


def block_bytes(chunks: Sequence[VisionLanguageModel], block_size: int) -> int:
    """Memory of a block of the cache on this rank."""
    language = chunks[0].recipe.model.language
    head_ranks = (
        parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    )
    heads = max(1, language.num_key_value_heads // head_ranks)
    layers = max(1, sum(len(chunk.language_model.decoder.layers) for chunk in chunks))
    itemsize = next(chunks[0].parameters()).element_size()
    return 2 * layers * heads * language.head_width * block_size * itemsize


def cache_bytes(config: InferenceConfig) -> int:
    """Memory of the cache on this rank at most; the model must be loaded."""
    if config.inference_dynamic_batching_buffer_size_gb:
        return int(config.inference_dynamic_batching_buffer_size_gb * 2**30)
    free = free_device_memory()
    return _CACHE_BYTES_ON_CPU if free is None else int(_SHARE_OF_FREE_MEMORY * free)


def num_blocks(chunks: Sequence[VisionLanguageModel], config: InferenceConfig) -> int:
    """Blocks that fit into this rank's cache; at most twice those of a full batch of the longest sequences."""
    block_size = config.inference_dynamic_batching_block_size
    fitting = cache_bytes(config) // block_bytes(chunks, block_size)
    per_request = -(-max_sequence_length(chunks[0].recipe, config) // block_size)
    return min(fitting, 2 * config.inference_max_requests * per_request + 1)
