"""The published vision tower's layers that no image feature depends on.

An export must return them, so the model carries them as buffers and every checkpoint stores them. They are zero until a
checkpoint fills them. Nothing is computed with them: a buffer has the published tensor's name with `__` for `.`, and
checkpoint_convert.mapping.hf_names turns that into the Hugging Face name.
"""

from __future__ import annotations

import torch

from megatron_vlm.config import VisionConfig


class UnusedLayers(torch.nn.Module):
    """Buffers for the layers behind the feature layer, the final norm and the pooling head."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in unused_shapes(config).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))


def unused_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Buffer name -> shape."""
    width, inner = config.hidden_size, config.intermediate_size
    mlp = {"mlp__fc1": (inner, width), "mlp__fc2": (width, inner)}
    attention = {f"self_attn__{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes = _norm("post_layernorm", width)
    for layer in range(config.num_layers_used, config.num_hidden_layers):
        prefix = f"encoder__layers__{layer}__"
        shapes |= _norm(f"{prefix}layer_norm1", width) | _norm(f"{prefix}layer_norm2", width)
        shapes |= _linears(prefix, attention | mlp)
    if config.pooling_head:
        shapes |= {"head__probe": (1, 1, width)} | _norm("head__layernorm", width)
        shapes |= {"head__attention__in_proj_weight": (3 * width, width), "head__attention__in_proj_bias": (3 * width,)}
        shapes |= _linears("head__", {"attention__out_proj": (width, width)} | mlp)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}__weight": (width,), f"{name}__bias": (width,)}


def _linears(prefix: str, weights: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        shapes |= {f"{prefix}{name}__weight": shape, f"{prefix}{name}__bias": shape[:1]}
    return shapes
