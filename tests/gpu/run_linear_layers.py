"""Train the test model for some steps with several kinds of linear layers, one after the other; save their losses.

python run_linear_layers.py FILE.json STEPS KIND...       KIND: local, transformer_engine, fp8_delayed, fp8_tensorwise
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import tensor_parallel

from megatron_vlm.config import ParallelConfig, check_recipe
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.optimizer import build_optimizer, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward, global_loss, rows_for_chunks
from tests.parallel.rows import rows_of, tiny_recipe


def settings_of(kind: str) -> dict[str, Any]:
    if kind == "local":
        return {}
    fp8 = {"fp8_format": "hybrid", "fp8_recipe": kind.partition("_")[2]} if kind.startswith("fp8") else {}
    return {"transformer_impl": "transformer_engine", **fp8}


def losses(kind: str, steps: int) -> list[float]:
    """In bf16, with widths that FP8 can have."""
    recipe = tiny_recipe(ParallelConfig(), bf16=True, **settings_of(kind))
    recipe.model.language.intermediate_size = 80
    check_recipe(recipe, 1)
    initialize_groups(recipe.parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_model(recipe, for_training=True)
    initialize_weights(chunks, recipe)
    wrapped = wrap_for_data_parallel(chunks, recipe)
    optimizer = build_optimizer(wrapped, recipe)
    rows, found = rows_for_chunks(rows_of(0, 1, (0, 1)), 1), []
    for _ in range(steps):
        loss, _ = global_loss(forward_backward(wrapped, rows, recipe))
        update(optimizer, loss)
        found.append(loss)
    destroy_groups()
    return found


def main(file: str, steps: str, *kinds: str) -> None:
    with process_group(timeout_minutes=2):
        Path(file).write_text(json.dumps({kind: losses(kind, int(steps)) for kind in kinds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
