"""Loading: every rank reads its own share, from a checkpoint of any layout, straight into its tensors."""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.config import ModelConfig, Recipe, recipe_from_dict, recipe_to_dict
from megatron_vlm.config.lora import lora_settings, uses_lora
from megatron_vlm.model.layers.lora import is_adapter
from megatron_vlm.model.sharding import model_sharded_state_dict, unwrap
from megatron_vlm.runtime.s3 import S3Error
from megatron_vlm.runtime.s3.path import StoragePath
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import COMMON, read_description
from megatron_vlm.training.checkpoint.planner import ShardLoadPlanner
from megatron_vlm.training.checkpoint.progress import Progress
from megatron_vlm.training.checkpoint.s3_storage import checkpoint_reader
from megatron_vlm.training.checkpoint.shards import LocalState, chained, model_state, optimizer_state
from megatron_vlm.training.param_groups import match_param_groups, recipe_settings, restore_settings


def load_checkpoint(
    checkpoint: StoragePath,
    chunks: list[Any],
    recipe: Recipe,
    *,
    tokenizer_fingerprint: str = "",
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> Progress:
    """Fill the chunks, and optimizer and schedule where given, from `checkpoint` (an iter_* folder), in any layout.

    Without an optimizer, LoRA adapters that the checkpoint lacks keep their values: a new run begins with new ones.

    Raises:
        CheckpointError: the checkpoint is of another model or tokenizer, lacks what is asked for, or cannot be read.
    """
    common = check_fits(checkpoint, recipe, tokenizer_fingerprint, resume=optimizer is not None)
    state = model_state(chunks)
    if optimizer is None and not _has_adapters(checkpoint):
        state = LocalState([shard for shard in state.shards if not is_adapter(shard.key)], state.objects)
    if optimizer is not None:
        settings = recipe_settings(optimizer.param_groups)
        whole = optimizer_state(optimizer, chunks, loading=True)
        state = LocalState(state.shards + whole.shards, state.objects + whole.objects)
    _read(checkpoint, state, chunks)
    if optimizer is not None:
        restore_settings(optimizer.param_groups, settings)
        for member, loaded in zip(chained(optimizer), whole.merged(common["optimizer"]), strict=True):
            match_param_groups(loaded, member.param_groups)
            member.load_state_dict(loaded)
        restore_settings(optimizer.param_groups, settings)
    if schedule is not None:
        schedule.load_state_dict(common["schedule"])
    return Progress(**common["progress"])


@torch.no_grad()
def _read(checkpoint: StoragePath, state: LocalState, chunks: list[Any]) -> None:
    planner = ShardLoadPlanner(state, str(checkpoint))
    try:
        _load_alone(checkpoint, planner)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError):
            raise cause from None
        if isinstance(cause, S3Error):
            raise CheckpointError(str(cause)) from error
        raise CheckpointError(f"{checkpoint} cannot be read ({cause}): copy the checkpoint again") from error
    if planner.loaded_objects:
        for chunk in chunks:
            unwrap(chunk).load_state_dict(_objects_of(chunk, planner.loaded_objects), strict=False)


def _objects_of(chunk: Any, loaded: dict[str, Any]) -> dict[str, Any]:
    """Under the names of the chunk's state dict, which count its own layers; a checkpoint counts those of the model."""
    return {
        name: loaded[value.unique_key]
        for name, value in model_sharded_state_dict(chunk).items()
        if isinstance(value, ShardedObject) and value.unique_key in loaded
    }


def _load_alone(checkpoint: StoragePath, planner: ShardLoadPlanner) -> None:
    """Read what the planner asks for, on this rank alone; torch warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({}, storage_reader=checkpoint_reader(checkpoint), planner=planner, no_dist=True)


def load_common(checkpoint: StoragePath) -> dict[str, Any]:
    """What of a checkpoint is the same on every rank: progress, schedule, the optimizer's groups.

    Raises:
        CheckpointError: it cannot be read, or holds more than plain values.
    """
    path = checkpoint / COMMON
    try:
        if path.is_file():
            loaded = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        else:
            loaded = _common_among_tensors(checkpoint)
    except CheckpointError:
        raise
    except S3Error as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # pickle raises whatever the bytes happen to mean
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): it is damaged, or was made to run code. Copy the "
            "checkpoint again from a source that you trust"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no training state. Copy the checkpoint again")
    return loaded


def read_progress(checkpoint: StoragePath) -> Progress:
    """Where the run stood. Raises as `load_common`."""
    return Progress(**load_common(checkpoint)["progress"])


def _common_among_tensors(checkpoint: StoragePath) -> dict[str, Any]:
    """As megatron-core 0.19 saves it."""
    from megatron_vlm.training.checkpoint.shards import StoredObject

    planner = ShardLoadPlanner(
        LocalState([], [StoredObject("common_state/shard_0_1", None, (0, 0, 0))]), str(checkpoint)
    )
    try:
        _load_alone(checkpoint, planner)
        (loaded,) = planner.loaded_objects.values()
    except (CheckpointException, ValueError) as error:
        last = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"where the run stood cannot be read from the .distcp files of {checkpoint} ({last}). Copy the checkpoint "
            "again"
        ) from error
    assert isinstance(loaded, dict)
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check_fits(checkpoint: StoragePath, recipe: Recipe, fingerprint: str, *, resume: bool) -> dict[str, Any]:
    """Whether a run can start from a checkpoint, by its small files; tensors are not looked at.

    Args:
        checkpoint: an iter_* folder.
        recipe: of the run.
        fingerprint: of its tokenizer.
        resume: with optimizer state; otherwise from the weights.

    Returns:
        What `load_common` does.

    Raises:
        CheckpointError: it is of another model or tokenizer, or cannot be resumed.
    """
    stored = read_description(checkpoint)
    require_same_model(recipe.model, recipe_from_dict(stored["recipe"]).model, str(checkpoint))
    require_same_tokenizer(recipe, fingerprint, stored.get("tokenizer_fingerprint", ""), str(checkpoint))
    _check_same_adapters(checkpoint, recipe, recipe_from_dict(stored["recipe"]))
    common = load_common(checkpoint)
    if resume:
        if (common.get("content_metadata") or {}).get("weights_only"):
            raise CheckpointError(f"{checkpoint} holds only weights: start from it with --pretrained-checkpoint")
        _check_same_parts(checkpoint, recipe)
    return common


def require_same_model(ours: ModelConfig, theirs: ModelConfig, source: str) -> None:
    """Raise CheckpointError where the weights of `source`, of the model `theirs`, are none of the model `ours`."""
    here, there = asdict(ours), asdict(theirs)
    wrong = [
        f"model.{part}.{name} is {here[part][name]} here and {there[part][name]} there"
        for part in ("vision", "language")
        for name in here[part]
        if here[part][name] != there[part][name] and name != "max_position_embeddings"
    ]
    if ours.image_token_index != theirs.image_token_index:
        wrong.append(f"model.image_token_index is {ours.image_token_index} here, {theirs.image_token_index} there")
    if wrong:
        raise CheckpointError(f"{source} holds a different model: " + "; ".join(wrong))


def require_same_tokenizer(recipe: Recipe, ours: str, theirs: str, source: str) -> None:
    """Raise CheckpointError where two fingerprints of tokenizers, if both are known, differ."""
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{source} was trained with another tokenizer (fingerprint {theirs[:12]}) than "
            f"{recipe.data.tokenizer_model} ({ours[:12]}), which gives tokens other ids. Set "
            "--tokenizer-model to the one it was trained with."
        )


def _has_adapters(checkpoint: StoragePath) -> bool:
    return uses_lora(recipe_from_dict(read_description(checkpoint)["recipe"]).training)


def _check_same_adapters(checkpoint: StoragePath, recipe: Recipe, stored: Recipe) -> None:
    """Raise CheckpointError where a checkpoint has adapters that the recipe has not, or others."""
    ours, theirs = lora_settings(recipe.training), lora_settings(stored.training)
    if theirs is None or ours == theirs:
        return
    settings = ", ".join(f"{name} {value}" for name, value in theirs.items())
    raise CheckpointError(
        f"{checkpoint} holds LoRA adapters ({settings}), and the recipe asks for "
        + ("none" if ours is None else ", ".join(f"{name} {value}" for name, value in ours.items()))
        + ". Train with the same ones (trainable: language_lora), or merge them into the weights first: megatron-vlm "
        "export, and give its folder as --pretrained-checkpoint"
    )


def _check_same_parts(checkpoint: StoragePath, recipe: Recipe) -> None:
    ours = sorted(recipe.training.trainable)
    theirs = sorted(recipe_from_dict(read_description(checkpoint)["recipe"]).training.trainable)
    if ours != theirs:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: trainable is {', '.join(ours)} here and {', '.join(theirs)} there. "
            "Training other model parts is a new stage: start it with --pretrained-checkpoint and another --save."
        )


def recipe_differences(checkpoint: StoragePath, recipe: Recipe) -> list[str]:
    """Settings that differ from those that a checkpoint was saved with, as `section.name: before -> now`."""
    before = recipe_to_dict(recipe_from_dict(read_description(checkpoint)["recipe"]))
    now = recipe_to_dict(recipe)
    return sorted(_differences(before, now, ""))


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for name, value in now.items():
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            found += _differences(before[name], value, f"{prefix}{name}.")
        elif before.get(name) != value:
            found.append(f"{prefix}{name}: {before.get(name)} -> {value}")
    return found
