"""Megatron checkpoints as named tensors: written, read, or loaded into one unsharded model.

The distributed format loads in any parallel layout, so conversion need not know the layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.folder import check_space
from checkpoint_convert.mapping.lazy_tensors import JoinedTensors, StoredTensors
from checkpoint_convert.mapping.lora import Adapter, MergedTensors
from checkpoint_convert.mapping.param_map import Entry, MegatronTensors, param_map
from checkpoint_convert.megatron.reader import CheckpointTensors
from checkpoint_convert.megatron.writer import StreamingSave, layer_name, slice_for_shard
from megatron_vlm.config import ConfigError, ModelConfig, ParallelConfig, Recipe, recipe_to_dict
from megatron_vlm.config.checks.model import check_language, check_vision
from megatron_vlm.config.lora import LANGUAGE_LORA, uses_lora
from megatron_vlm.data.dataset import max_sample_tokens
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import all_sharded_tensors, initial_value
from megatron_vlm.model.sharding import model_sharded_state_dict
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import (
    RECIPE,
    TRACKER,
    CheckpointError,
    Progress,
    load_checkpoint,
    load_common,
    read_recipe,
    require_checkpoint,
)


def tensors_of(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The tensors of an unsharded model, under the parameter map's Megatron names."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state")
    }


def write_checkpoint(
    folder: Path, recipe: Recipe, tensors: Mapping[str, torch.Tensor], tokenizer_fingerprint: str
) -> list[str]:
    """Save a checkpoint of iteration 0 that holds `tensors`, each read when it is written.

    Returns the names of the model's tensors that are not in `tensors`: they have their initial values.
    """
    target = folder / "iter_0000000"
    target.mkdir(parents=True)
    with distributed(recipe.parallel, seed=recipe.training.seed):
        (model,) = build_model(recipe, torch.device("meta"))

        def value_of(shard: ShardedTensor) -> torch.Tensor:
            name = layer_name(shard)
            return slice_for_shard(tensors[name], shard) if name in tensors else initial_value(shard, recipe)

        ours = tensors_of(model)
        check_space(folder, sum(tensor.nbytes for tensor in ours.values()))
        state = {
            "model": model_sharded_state_dict(model),
            "progress": vars(Progress(tokenizer_fingerprint=tokenizer_fingerprint)),
        }
        dist_checkpointing.save(
            state, str(target), sharded_strategy=StreamingSave(value_of), content_metadata={"weights_only": True}
        )
    written = {"recipe": recipe_to_dict(recipe), "tokenizer_fingerprint": tokenizer_fingerprint}
    (target / RECIPE).write_text(json.dumps(written, indent=1))
    (folder / TRACKER).write_text("0")
    return sorted(ours.keys() - tensors.keys())


def write_model(
    staging_dir: Path,
    save: Path,
    model: ModelConfig,
    entries: list[Entry],
    tensors: StoredTensors,
    source: str,
    fingerprint: str,
    aspect_ratio: str,
    adapter: Adapter | None = None,
) -> list[str]:
    """Save a checkpoint of a model whose weights are Hugging Face tensors.

    Args:
        staging_dir: where to write.
        save: the folder's final path; the recipe names the tokenizer in it.
        model: the model's config.
        entries: the entries of its parameter map for which there are tensors.
        tensors: under Hugging Face names.
        source: name of the source in errors.
        fingerprint: the tokenizer's.
        aspect_ratio: image_aspect_ratio: how images are tiled.
        adapter: LoRA adapter that is stored beside the weights.

    Returns:
        Names of the tensors that have their initial values.

    Raises:
        ConversionError: sizes that megatron-core cannot compute, or tensors that are missing, unexpected or of another
            shape.
    """
    recipe = imported_recipe(model, aspect_ratio, source)
    recipe.data.tokenizer_model = str(save.absolute() / "tokenizer")
    if adapter is not None:
        recipe.training = adapter.training
        entries, tensors = [*entries, *adapter.entries], JoinedTensors(tensors, adapter.tensors)
    # bf16 is kept; float16 and mixtures of dtypes become fp32, which holds them exactly.
    recipe.training.bf16 = all(tensors.dtype(name) == torch.bfloat16 for name in tensors)
    return write_checkpoint(staging_dir, recipe, MegatronTensors(entries, tensors, source), fingerprint)


def imported_recipe(model: ModelConfig, aspect_ratio: str, source: str) -> Recipe:
    """The recipe of a model that was not trained here; ConversionError for sizes that megatron-core cannot compute."""
    recipe = Recipe(model=model)
    recipe.data.seq_length = model.language.max_position_embeddings
    recipe.data.image_aspect_ratio = aspect_ratio
    # As transformers: LlavaNext tiles every image, LlavaOnevision only single ones.
    recipe.data.multi_image_aspect_ratio = "same" if aspect_ratio == "anyres" else "pad"
    problems = [*check_vision(recipe), *check_language(recipe)]
    if problems:
        raise ConversionError(f"{source}: " + "; ".join(map(str, problems)))
    return recipe


def fill_model(chunks: list[VisionLanguageModel], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's shards of `tensors`, unsharded and under the parameter map's Megatron names, into the model."""
    for chunk in chunks:
        state = model_sharded_state_dict(chunk)
        apply_factories(state)
        with torch.no_grad():
            for shard in all_sharded_tensors(state):
                shard.data.copy_(slice_for_shard(tensors[layer_name(shard)], shard))


def checkpoint_recipe(folder: Path) -> Recipe:
    """The recipe of a checkpoint for a single process, its max_position_embeddings the longest sample trained on.

    It has no LoRA adapters, because `checkpoint_tensors` has them merged.

    Raises ConversionError if there is no checkpoint, or it cannot be read.
    """
    recipe = trained_recipe(folder)
    recipe.model.language.max_position_embeddings = max_sample_tokens(recipe)
    recipe.parallel = ParallelConfig()
    if uses_lora(recipe.training):
        recipe.training.trainable = [
            "language" if part == LANGUAGE_LORA else part for part in recipe.training.trainable
        ]
    return recipe


def trained_recipe(folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with. Errors as in checkpoint_recipe."""
    try:
        return read_recipe(folder)
    except (CheckpointError, ConfigError) as error:
        raise ConversionError(str(error)) from error
    except (ValueError, KeyError) as error:
        raise ConversionError(
            f"{folder}: its {TRACKER} or the {RECIPE} of the checkpoint that it names cannot be read ({error}): "
            "copy the checkpoint again"
        ) from error


def checkpoint_progress(folder: Path) -> Progress:
    """Iteration and data position of the newest checkpoint. Raises ConversionError if they cannot be read."""
    try:
        return Progress(**load_common(require_checkpoint(folder))["progress"])
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def checkpoint_tensors(folder: Path) -> StoredTensors:
    """The tensors of the newest checkpoint in a save folder, of any parallel layout, LoRA adapters merged into them."""
    stored, recipe = stored_tensors(folder), trained_recipe(folder)
    if not uses_lora(recipe.training):
        return stored
    return MergedTensors(param_map(recipe.model), stored, recipe.training.lora_alpha / recipe.training.lora_r)


def stored_tensors(folder: Path) -> CheckpointTensors:
    """The same as they are stored, adapters apart."""
    try:
        return CheckpointTensors(require_checkpoint(folder))
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


@contextmanager
def loaded_model(folder: Path) -> Iterator[VisionLanguageModel]:
    """The unsharded model of the newest checkpoint in `folder`, inside the block."""
    recipe = checkpoint_recipe(folder)
    with distributed(recipe.parallel):
        chunks = build_model(recipe)
        load_checkpoint(require_checkpoint(folder), chunks, recipe)
        yield chunks[0].eval()
