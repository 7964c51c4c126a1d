"""Checkpoints in megatron-core's distributed format, which any parallel layout can load.

SAVE/iter_0000010/            one complete state: weights, optimizer, schedule, data position, recipe.json
SAVE/latest_checkpointed_iteration.txt    written last: it always names a complete state
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vlm.config import Recipe, recipe_from_dict, recipe_to_dict
from megatron_vlm.model.sharding import model_sharded_state_dict, sharding_metadata, unwrap
from megatron_vlm.runtime.atomic_files import atomic_file, atomic_folder
from megatron_vlm.training.param_groups import match_param_groups, recipe_lrs, restore_lrs

TRACKER = "latest_checkpointed_iteration.txt"
RECIPE = "recipe.json"


class CheckpointError(Exception):
    """A checkpoint that is missing or incomplete, or that does not fit the recipe."""


@dataclass
class Progress:
    """Position of a run in its data, and what a resumed run is checked against."""

    iteration: int = 0
    consumed_rows: int = 0
    tokenizer_fingerprint: str = ""
    plan_inputs: str = ""
    """What determines the order of rows, as JSON (data.plan_fingerprint); empty in checkpoints of older versions."""


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a save folder; None if there is none.

    Raises:
        CheckpointError: the tracker file names a checkpoint that is missing or incomplete.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file():
        return None
    named = Path(folder) / f"iter_{int(tracker.read_text().strip()):07d}"
    if not (named / RECIPE).is_file():
        raise CheckpointError(
            f"{tracker} names {named.name}, which is missing or incomplete: restore it or edit {TRACKER}"
        )
    return named


def require_checkpoint(folder: str | Path) -> Path:
    """Like latest_checkpoint, but raises CheckpointError if there is none."""
    found = latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no finished checkpoint (no {TRACKER}): is it a folder given as --save?")
    return found


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of the newest checkpoint in a save folder; errors as in require_checkpoint."""
    return recipe_from_dict(json.loads((require_checkpoint(folder) / RECIPE).read_text())["recipe"])


def _check_same_model(checkpoint: Path, recipe: Recipe, fingerprint: str) -> None:
    stored = json.loads((checkpoint / RECIPE).read_text())
    # Through a Recipe, so that settings which an older checkpoint lacks have their defaults.
    theirs = recipe_to_dict(recipe_from_dict(stored["recipe"]))["model"]
    ours = recipe_to_dict(recipe)["model"]
    wrong = [
        f"model.{part}.{name} is {ours[part][name]} here and {theirs[part][name]} there"
        for part in ("vision", "language")
        for name in ours[part]
        if ours[part][name] != theirs[part][name] and name != "max_position_embeddings"
    ]
    if ours["image_token_index"] != theirs["image_token_index"]:
        wrong.append(
            f"model.image_token_index is {ours['image_token_index']} here, {theirs['image_token_index']} there"
        )
    if wrong:
        raise CheckpointError(f"{checkpoint} holds a different model: " + "; ".join(wrong))
    known = stored.get("tokenizer_fingerprint")
    if known and fingerprint and known != fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer (fingerprint {known[:12]}) than "
            f"{recipe.data.tokenizer_model} ({fingerprint[:12]}), which gives tokens other ids. Set "
            "--tokenizer-model to the one it was trained with."
        )


def _check_same_trainable(checkpoint: Path, recipe: Recipe) -> None:
    ours = sorted(recipe.training.trainable)
    theirs = sorted(recipe_from_dict(json.loads((checkpoint / RECIPE).read_text())["recipe"]).training.trainable)
    if ours != theirs:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: trainable is {', '.join(ours)} here and {', '.join(theirs)} there. "
            "Training other model parts is a new stage: start it with --pretrained-checkpoint and another --save."
        )


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    return {f"chunk{i}": model_sharded_state_dict(chunk) for i, chunk in enumerate(chunks)}


def _optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> Any:
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=sharding_metadata())


def save_checkpoint(
    folder: str | Path,
    chunks: list[Any],
    recipe: Recipe,
    progress: Progress,
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this. Without an optimizer it holds only weights.

    Returns the folder SAVE/iter_*.
    """
    folder = Path(folder)
    target = folder / f"iter_{progress.iteration:07d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    state = _model_state(chunks)
    if optimizer is not None and schedule is not None:
        state["optimizer"] = _optimizer_state(optimizer, state, loading=False)
        state["schedule"] = schedule.state_dict()
    state["progress"] = vars(progress)
    dist_checkpointing.save(state, str(target), content_metadata={"weights_only": optimizer is None})
    dist.barrier()
    if dist.get_rank() == 0:
        written = {"recipe": recipe_to_dict(recipe), "tokenizer_fingerprint": progress.tokenizer_fingerprint}
        with atomic_file(target / RECIPE) as file:
            file.write(json.dumps(written, indent=1).encode())
        _keep_tokenizer(recipe, folder)
        with atomic_file(folder / TRACKER) as file:
            file.write(str(progress.iteration).encode())
    dist.barrier()
    return target


def _keep_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Copy the tokenizer into the save folder: inference and export need it."""
    source, kept = Path(recipe.data.tokenizer_model or "/nonexistent"), folder / "tokenizer"
    if kept.exists() or not source.exists():
        return
    with atomic_folder(kept) as staging_dir:
        if source.is_dir():
            shutil.copytree(source, staging_dir, dirs_exist_ok=True)
        else:
            shutil.copy(source, staging_dir)


def load_checkpoint(
    checkpoint: Path,
    chunks: list[Any],
    recipe: Recipe,
    *,
    tokenizer_fingerprint: str = "",
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> Progress:
    """Load `checkpoint` (a folder SAVE/iter_*) into the chunks and, if given, the optimizer and the schedule.

    Raises:
        CheckpointError: the checkpoint was written with a different model, tokenizer or, if an optimizer is given,
            `trainable`; or it has no optimizer state.
    """
    _check_same_model(checkpoint, recipe, tokenizer_fingerprint)
    state = _model_state(chunks)
    if optimizer is not None:
        if (dist_checkpointing.load_content_metadata(str(checkpoint)) or {}).get("weights_only"):
            raise CheckpointError(f"{checkpoint} holds only weights: start from it with --pretrained-checkpoint")
        _check_same_trainable(checkpoint, recipe)
        rates = recipe_lrs(optimizer.param_groups)
        state["optimizer"] = _optimizer_state(optimizer, state, loading=True)
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"chunk{i}"])
    if optimizer is not None:
        restore_lrs(optimizer.param_groups, rates)
        match_param_groups(loaded["optimizer"], optimizer.param_groups)
        optimizer.load_state_dict(loaded["optimizer"])
        restore_lrs(optimizer.param_groups, rates)
    if schedule is not None:
        schedule.load_state_dict(loaded["schedule"])
    return Progress(**loaded["progress"])
