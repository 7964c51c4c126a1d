"""Random initial weights that are the same in every parallel layout.

megatron-core samples weights while it builds the model, so they depend on the number of stages and ranks. Here each
tensor of the whole model has a generator of its own, seeded by (seed, name, layer), and each rank keeps its shard. So
the tensors can be sampled in any order, and are by several threads.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from megatron_vlm.config import Recipe
from megatron_vlm.model.layers.lora import is_adapter
from megatron_vlm.model.sharding import model_sharded_state_dict
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import cores_per_rank

_Initializer = Callable[[torch.Size, torch.Generator, int], torch.Tensor]


def _normal(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    """N(0, 1 / fan in): a standard deviation of 0.022 at the width of OLMo-1B, whose own initializer uses 0.02."""
    return torch.empty(shape).normal_(0.0, shape[1:].numel() ** -0.5, generator=generator)


def _residual(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    """Projections into the residual stream are scaled by 1 / sqrt(2 layers), as in GPT-2."""
    return _normal(shape, generator, layers).mul_((2 * layers) ** -0.5)


def _small(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    """Position embeddings: standard deviation 0.02, as in CLIP."""
    return torch.empty(shape).normal_(0.0, 0.02, generator=generator)


def _vector(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    """The class embedding and the image newline: N(0, 1 / width)."""
    return torch.empty(shape).normal_(0.0, shape.numel() ** -0.5, generator=generator)


def _ones(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    return torch.ones(shape)


def _zeros(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    return torch.zeros(shape)


def _kaiming(shape: torch.Size, generator: torch.Generator, layers: int) -> torch.Tensor:
    """torch's default for a linear layer, which peft has for A: uniform within 1 / sqrt(fan in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) * shape[1:].numel() ** -0.5


_RULES: list[tuple[str, _Initializer]] = [
    (r"\.lora\.\w+\.A$", _kaiming),
    (r"\.lora\.\w+\.B$", _zeros),
    (r"\.unused\.", _zeros),
    (r"norm\.weight$", _ones),
    (r"\.bias$", _zeros),
    (r"class_embedding$|image_newline$", _vector),
    (r"position_embedding\.weight$", _small),
    (r"(linear_proj|linear_fc2)\.weight$", _residual),
    (r"\.weight$", _normal),
]


def _rule(key: str) -> _Initializer:
    for pattern, initializer in _RULES:
        if re.search(pattern, key):
            return initializer
    raise KeyError(f"no rule initialises {key}: add one to _RULES in {__name__}")


def initial_value(tensor: ShardedTensor, recipe: Recipe) -> torch.Tensor:
    """Initial value of a shard, of its local shape; depends only on the seed and the tensor's name and layer."""
    vision, language = recipe.model.vision, recipe.model.language
    layers = vision.num_layers_used if tensor.key.startswith("vision_model.") else language.num_hidden_layers
    stacked = tensor.prepend_axis_num
    layer = tensor.global_offset[:stacked]
    digest = hashlib.sha256(f"{recipe.training.seed}/{tensor.key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    whole = _rule(tensor.key)(torch.Size(tensor.global_shape[stacked:]), generator, layers)
    offsets = tensor.global_offset[stacked:]
    return whole[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.local_shape, strict=True))]


def initialize_weights(chunks: list[VisionLanguageModel], recipe: Recipe, *, adapters_only: bool = False) -> None:
    """Initialise every parameter and buffer from the recipe's seed, in place; the same in all parallel layouts.

    Args:
        chunks: of this rank.
        recipe: of the run.
        adapters_only: leave everything but LoRA adapters as it is.
    """
    state = {f"chunk{i}": model_sharded_state_dict(chunk) for i, chunk in enumerate(chunks)}
    apply_factories(state)
    sharded, _ = extract_sharded_tensors(state)
    tensors = [tensor for tensor in all_sharded_tensors(sharded) if is_adapter(tensor.key) or not adapters_only]
    # Sampling uses one core and releases the interpreter's lock. Large tensors first, so that threads end together.
    tensors.sort(key=lambda tensor: math.prod(tensor.global_shape[tensor.prepend_axis_num :]), reverse=True)
    with ThreadPoolExecutor(cores_per_rank(), thread_name_prefix="weights") as threads:
        for _ in threads.map(partial(_initialize, recipe=recipe), tensors):
            pass


@torch.no_grad()
def _initialize(tensor: ShardedTensor, recipe: Recipe) -> None:
    tensor.data.copy_(initial_value(tensor, recipe))


def all_sharded_tensors(state: object) -> list[ShardedTensor]:
    """The sharded tensors in a nested state dict, in order."""
    if isinstance(state, ShardedTensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in values for tensor in all_sharded_tensors(value)]
