"""Write a recipe whose model is small enough to run the full-size benchmarks in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_small_recipe(path: Path, *, seq_length: int, max_tiles: int, grids: list[list[int]]) -> Path:
    """Write a recipe with tiles of 28 x 28 pixels to `path`; returns `path`."""
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    language = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": seq_length,
    }  # fmt: skip
    model: dict[str, Any] = {"vision": vision, "language": language, "image_token_index": 500}
    model["image_grid_pinpoints"] = grids
    data = {"seq_length": seq_length, "max_tiles_per_row": max_tiles}
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    return path
