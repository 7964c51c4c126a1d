"""The `llava_onevision` format: a `llava_next` model with other defaults, which reduces large grids (anyres_max_N).

A single image gives the same features here as in transformers. For a sample with several images, transformers pads each
image to one tile, while we tile each one. Videos are not supported.
"""

from __future__ import annotations

import re
from typing import Any

from checkpoint_convert.huggingface.config import model_from_llava_next
from checkpoint_convert.mapping.families import Problems
from megatron_vlm.config import ModelConfig

_SIDE, _MOST_TILES = 384, 6
"""The default resolutions are all of up to 6 x 6 tiles of this side, in pixels."""


def model_from_llava_onevision(config: dict[str, Any], source: str) -> tuple[ModelConfig, str]:
    """A LlavaOnevisionConfig as ours, and its image_aspect_ratio; errors as in model_from_llava_next."""
    aspect_ratio = str(config.get("vision_aspect_ratio", "anyres_max_9"))
    problems = Problems(source)
    if not re.fullmatch(r"anyres_max_[1-9]\d*", aspect_ratio):
        problems.found.append(f"vision_aspect_ratio is {aspect_ratio!r}; supported: 'anyres_max_N'")
    sides = [_SIDE * count for count in range(1, _MOST_TILES + 1)]
    defaults = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": config.get("image_token_id", 151646),
        "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
    }
    parts = {
        "vision_config": {"model_type": "siglip_vision_model", **problems.section(config, "vision_config")},
        "text_config": {"model_type": "qwen2", **problems.section(config, "text_config")},
    }
    given = {name: value for name, value in config.items() if value is not None}
    llava_next = {**defaults, **given, **parts, "model_type": "llava_next"}
    return model_from_llava_next(llava_next, source), aspect_ratio
