"""A run of 500 iterations that saves every 5, and what its processes hold meanwhile; as JSON.

torchrun --nproc-per-node 2 -m tests.training.run_soak RECIPE SAVE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_vlm.config import load_recipe
from megatron_vlm.runtime.launch import initialize_model_parallel, process_group
from megatron_vlm.training.trainer import Trainer

ITERATIONS, SAVE_INTERVAL, LOOK_INTERVAL = 500, 5, 10


def held(process: psutil.Process) -> dict[str, int]:
    children = process.children(recursive=True)
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "memory": process.memory_info().rss,
        "processes": len(children),
        "memory of children": sum(child.memory_info().rss for child in children),
    }


def main() -> None:
    recipe, save = load_recipe(sys.argv[1]), sys.argv[2]
    training = recipe.training
    training.save, training.train_iters, training.save_interval = save, ITERATIONS, SAVE_INTERVAL
    training.save_total_limit = 2
    with process_group(timeout_minutes=2):
        initialize_model_parallel(recipe.parallel)
        trainer = Trainer(recipe)
        seen: list[dict[str, Any]] = []
        step = trainer.train_step

        def train_step() -> dict[str, float]:
            values = step()
            if trainer.progress.iteration % LOOK_INTERVAL == 0:
                seen.append(held(psutil.Process()))
            return values

        trainer.train_step = train_step  # type: ignore[method-assign]
        trainer.train()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, seen)
        if dist.get_rank() == 0:
            Path(save, "soak.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main()
