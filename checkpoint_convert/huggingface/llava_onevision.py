"""The `llava_onevision` layout: a `llava_next` model with other defaults, whose large grids are reduced (anyres_max_N).

Its single images are what is computed here. Of a sample with several images transformers takes one padded tile each,
where we tile each as if it were alone; videos are not supported.
"""

from __future__ import annotations

import re
from typing import Any

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import model_from_llava_next
from megatron_vlm.config import ModelConfig

_SIDE, _MOST_TILES = 384, 6
"""Of the resolutions a config.json need not say: all of up to 6 x 6 tiles."""


def model_from_llava_onevision(config: dict[str, Any], source: str) -> tuple[ModelConfig, str]:
    """A LlavaOnevisionConfig as ours, and its image_aspect_ratio; ConversionError: what this model does not compute."""
    aspect_ratio = str(config.get("vision_aspect_ratio", "anyres_max_9"))
    if not re.fullmatch(r"anyres_max_[1-9]\d*", aspect_ratio):
        raise ConversionError(
            f"{source} asks for what this model cannot do\n"
            f"  vision_aspect_ratio is {aspect_ratio!r}; supported: 'anyres_max_N'"
        )
    sides = [_SIDE * count for count in range(1, _MOST_TILES + 1)]
    defaults = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": config.get("image_token_id", 151646),
        "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
    }
    parts = {
        "vision_config": {"model_type": "siglip_vision_model", **(config.get("vision_config") or {})},
        "text_config": {"model_type": "qwen2", **(config.get("text_config") or {})},
    }
    given = {name: value for name, value in config.items() if value is not None}
    spelled = {**defaults, **given, **parts, "model_type": "llava_next"}
    return model_from_llava_next(spelled, source), aspect_ratio
