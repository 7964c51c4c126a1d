"""Train on the ranks of some parallel layouts, with and without samples. For test_training_samples.py.

run_training_samples.py RECIPE FOLDER LAYOUT...        saves FOLDER/LAYOUT and, for COMPARED, FOLDER/LAYOUT-without
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)
from megatron_vlm.config import check_recipe, load_recipe
from megatron_vlm.inference.training_samples import TrainingSamples
from megatron_vlm.runtime.launch import initialize_model_parallel, process_group
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training.trainer import Trainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
COMPARED = ("one", "dp2", "tp2", "vpp2")
SAMPLES, NEW_TOKENS = 5, 12


def _digest(chunks: list[Any]) -> str:
    """Of this rank's weights, of what is accumulated into, and of the random states of the process."""
    digest = hashlib.sha256(repr(random.getstate()).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    for chunk in chunks:
        assert chunk.training and chunk.module.training
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
            digest.update(parameter.main_grad.numpy().tobytes())
    return digest.hexdigest()


def train(recipe_file: str, folder: Path, layout: str) -> None:
    """A run with samples after iterations 1 to 3, and perhaps one without; each rank writes SAVE/digest-RANK."""
    for samples in (SAMPLES, 0) if layout in COMPARED else (SAMPLES,):
        save = folder / (layout if samples else f"{layout}-without")
        training = {
            "save": str(save), "train_iters": 3, "save_interval": 10, "eval_interval": 1, "log_interval": 2,
            "async_save": False, "lr": 0.02, "eval_generate_samples": samples, "eval_max_new_tokens": NEW_TOKENS,
        }  # fmt: skip
        data = {"num_workers": 0, "valid_share": 0.2}
        recipe = load_recipe(recipe_file, {"training": training, "data": data, "parallel": LAYOUTS[layout]})
        check_recipe(recipe, dist.get_world_size(), paths=True)
        initialize_model_parallel(recipe.parallel)
        random.seed(1)
        trainer = Trainer(recipe, [TrainingSamples(recipe)] if samples else [])
        trainer.train()
        (save / f"digest-{dist.get_rank()}").write_text(_digest(trainer.chunks))
        destroy_groups()


def main() -> None:
    recipe_file, folder, *layouts = sys.argv[1:]
    with process_group():
        for layout in layouts:
            train(recipe_file, Path(folder), layout)


def answers(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "generated_samples.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
