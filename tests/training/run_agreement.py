"""One of four ranks starts from something else, in several ways; what every rank says, as JSON.

torchrun --nproc-per-node 4 -m tests.training.run_agreement FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vlm.config import Recipe, load_recipe
from megatron_vlm.data.length_index import _Measurer
from megatron_vlm.data.sources.sample_source import AnnotationSource
from megatron_vlm.runtime import agreement
from megatron_vlm.runtime.agreement import RanksDisagreeError, require_agreement, require_same_start
from megatron_vlm.runtime.launch import initialize_model_parallel, process_group
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training import trainer as trainer_module
from megatron_vlm.training.checkpoint import Progress

ODD_RANK = 2
SHORT = 0.07
"""Minutes that a collective may take while data is measured for longer."""


def is_odd() -> bool:
    return dist.get_rank() == ODD_RANK


def other_recipe(recipe: Recipe, folder: Path) -> None:
    if is_odd():
        recipe.training.seed += 1
    require_same_start(recipe)


def other_code(recipe: Recipe, folder: Path) -> None:
    original = agreement._source_hash
    if is_odd():
        agreement._source_hash = lambda: "older"
    try:
        require_same_start(recipe)
    finally:
        agreement._source_hash = original


def other_layout(recipe: Recipe, folder: Path) -> None:
    if is_odd():
        recipe.parallel.tensor_model_parallel_size = 2
    require_same_start(recipe)


def _start(recipe: Recipe) -> None:
    initialize_model_parallel(recipe.parallel)
    try:
        trainer_module.Trainer(recipe)
    finally:
        destroy_groups()


def other_data(recipe: Recipe, folder: Path) -> None:
    """The same path with another content, as on a node whose disk has an older copy."""
    if is_odd():
        older = Path(recipe.data.data_path[0]).read_text().replace("?", "!", 1)
        original = AnnotationSource.__init__

        def opened(self: AnnotationSource, path: Any, image_folder: Any, cache_dir: Any = None) -> None:
            copy = folder / "older.json"
            copy.write_text(older)
            original(self, copy, image_folder)
            digest = self.quick_hash()
            self.name, self.quick_hash = str(path), lambda: digest

        AnnotationSource.__init__ = opened
    try:
        _start(recipe)
    finally:
        if is_odd():
            AnnotationSource.__init__ = original


def other_tokenizer(recipe: Recipe, folder: Path) -> None:
    if is_odd():
        recipe.data.tokenizer_model = str(folder / "other_tokenizer")
    _start(recipe)


def other_iteration(recipe: Recipe, folder: Path) -> None:
    original = trainer_module.read_progress

    def read_progress(checkpoint: Path) -> Progress:
        return Progress(iteration=8 if is_odd() else 9)

    resume, trainer_module.checkpoint_to_resume = trainer_module.checkpoint_to_resume, lambda *_: folder
    trainer_module.read_progress = read_progress
    try:
        _start(recipe)
    finally:
        trainer_module.read_progress, trainer_module.checkpoint_to_resume = original, resume


def nothing(recipe: Recipe, folder: Path) -> None:
    recipe.data.cache_dir = str(folder / f"cache{dist.get_rank()}")  # may differ
    require_same_start(recipe)
    require_agreement({"a": "1"})


def clocks(recipe: Recipe, folder: Path) -> None:
    """Only warns."""
    original = time.time
    if is_odd():
        agreement.time.time = lambda: original() - 600
    try:
        require_same_start(recipe)
    finally:
        agreement.time.time = original


def slow_measuring(recipe: Recipe, folder: Path) -> float:
    """Rank 0 measures for longer than any collective of training may take. Returns for how long the rank started."""
    recipe.data.cache_dir = str(folder / "measured slowly")
    original = _Measurer.measure

    def measure(self: _Measurer, index: int) -> Any:
        if index == 0:
            time.sleep(2 * 60 * SHORT)
        return original(self, index)

    _Measurer.measure = measure
    distributed_c10d._set_pg_timeout(timedelta(minutes=SHORT))
    started = time.monotonic()
    _start(recipe)
    _Measurer.measure = original
    return time.monotonic() - started


CASES: dict[str, Callable[[Recipe, Path], None]] = {
    case.__name__: case
    for case in (
        nothing, other_recipe, other_layout, other_code, other_data, other_tokenizer, other_iteration, clocks
    )
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    with process_group(timeout_minutes=2):
        for name, case in CASES.items():
            started = time.monotonic()
            try:
                case(load_recipe(folder / "recipe.yaml"), folder)
                message = ""
            except RanksDisagreeError as error:
                message = str(error)
            found[name] = {"message": message, "seconds": time.monotonic() - started}
        found["slow_measuring"] = slow_measuring(load_recipe(folder / "recipe.yaml"), folder)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main()
