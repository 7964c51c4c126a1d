"""A small training run of seconds through the command line, with real files and ranks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.data.helpers import mixed_folder, tiny_tokenizer_folder
from tests.support.forked_ranks import launch_forked

MODEL = {
    "vision": {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 8, "patch_size": 4,
    },
    "language": {
        "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 192,
    },
    "image_token_index": 500,
    "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16], [24, 8]],
}  # fmt: skip


def write_recipe(folder: Path, **training: Any) -> Path:
    """Write data (images of several sizes, text-only samples, one to three turns), tokenizer and recipe.yaml."""
    data = mixed_folder(folder / "data")
    recipe = {
        "model": MODEL,
        "data": {
            "data_path": [str(data.write())],
            "image_folder": str(data.images),
            "tokenizer_model": str(tiny_tokenizer_folder(folder / "tokenizer")),
            "seq_length": 192,
            "max_tiles_per_row": 16,
            "num_workers": 1,
        },
        "training": {
            "train_iters": 6, "global_batch_size": 4, "lr": 1e-3, "lr_warmup_fraction": 0.3, "weight_decay": 0.01,
            "distributed_timeout_minutes": 1, **training,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(
    recipe: Path, save: Path | None, *flags: str, ranks: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python -m megatron_vlm.train` on `ranks` processes."""
    saving = ("--save", str(save)) if save else ()
    return launch_forked(
        "-m", "megatron_vlm.train", "--config", recipe, *saving, *flags, ranks=ranks, timeout=240, check=check
    )


def metrics(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size", "2"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "cp2": ("--context-parallel-size", "2"),
    "dp2": (),
}
