"""The settings of a whole model in a folder, without its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import model_from_llava_next, read_config, with_image_normalization
from checkpoint_convert.huggingface.instellavl import model_from_instellavl
from checkpoint_convert.huggingface.llava_onevision import model_from_llava_onevision
from checkpoint_convert.huggingface.tokenizer import import_tokenizer
from megatron_vlm.config import ConfigError, ModelConfig, Recipe
from megatron_vlm.config.lora import uses_lora
from megatron_vlm.config.recipe import iter_settings
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import load_tokenizer

VLM_FORMATS = ("llava_next", "llava_onevision", "instellavl")
"""model_type of a whole VLM."""


def vlm_config(folder: Path, config: dict[str, Any], tokenizer: Path) -> tuple[ModelConfig, str]:
    """The model of a whole VLM's Hugging Face folder, and its image_aspect_ratio.

    Raises:
        ConversionError: it has settings that are not supported.
    """
    source = str(folder / "config.json")
    if config["model_type"] == "instellavl":
        index = config.get("image_token_index")
        return model_from_instellavl(config, source, _vocab_size(tokenizer) if index is None else index)
    if config["model_type"] == "llava_onevision":
        model, aspect_ratio = model_from_llava_onevision(config, source)
    else:
        model, aspect_ratio = model_from_llava_next(config, source), "anyres"
    return replace(model, vision=with_image_normalization(model.vision, folder)), aspect_ratio


def _vocab_size(tokenizer: Path) -> int:
    """Tokens of a tokenizer, without those that an export added."""
    with TemporaryDirectory() as folder:
        return len(import_tokenizer(tokenizer, Path(folder, "tokenizer")))


def complete_recipe(recipe: Recipe, given: set[str]) -> None:
    """Take the settings that the user did not give from the model that training starts from, in place.

    The model's settings and the tokenizer come from pretrained_checkpoint, and so do the settings of LoRA adapters that
    it has and the run trains on. image_token_index, if neither names it, is
    the tokenizer's next id: an export has a token `<image>` there. What cannot be read is left to the checks that
    follow, if model and tokenizer may be set elsewhere.

    Args:
        recipe: as read.
        given: dotted keys that the user set.

    Raises:
        ConfigError: the tokenizer is not given, and pretrained_checkpoint cannot be read.
    """
    source = Path(recipe.training.pretrained_checkpoint) if recipe.training.pretrained_checkpoint else None
    try:
        if source and (source / "config.json").is_file():
            given = given | _take_from_folder(recipe, given, source)
        elif source and source.is_dir():
            given = given | _take_from_checkpoint(recipe, given, source)
    except ConversionError as error:
        if not recipe.data.tokenizer_model:  # otherwise the checks would say that it is not set
            raise ConfigError(f"training.pretrained_checkpoint: {error}") from error
    if "model.image_token_index" not in given and recipe.data.tokenizer_model:
        try:
            length = len(load_tokenizer(recipe.data.tokenizer_model))
        except (DataError, OSError):
            return
        if length < recipe.model.language.vocab_size:
            recipe.model.image_token_index = length


def _take_from_folder(recipe: Recipe, given: set[str], source: Path) -> set[str]:
    config = read_config(source)
    format = config.get("model_type")
    if format not in VLM_FORMATS:
        raise ConversionError(
            f"{source} ({format}) is not a Hugging Face folder of a whole VLM. Give one, or join a vision tower and a "
            "language model with megatron-vlm import"
        )
    model, aspect_ratio = vlm_config(source, config, source)
    if "data.image_aspect_ratio" not in given:
        recipe.data.image_aspect_ratio = aspect_ratio
    if "data.tokenizer_model" not in given:
        recipe.data.tokenizer_model = str(source)
    return _take_model(recipe, given, model)


def _take_from_checkpoint(recipe: Recipe, given: set[str], source: Path) -> set[str]:
    from megatron_vlm.training.checkpoint import CheckpointError, read_recipe  # needs megatron-core

    try:
        stored = read_recipe(source)
    except (CheckpointError, OSError) as error:
        raise ConversionError(str(error)) from error
    if "data.tokenizer_model" not in given and (source / "tokenizer").exists():
        recipe.data.tokenizer_model = str(source / "tokenizer")
    if uses_lora(recipe.training) and uses_lora(stored.training):
        for name in ("lora_r", "lora_alpha", "lora_target_modules"):
            if f"training.{name}" not in given:
                setattr(recipe.training, name, getattr(stored.training, name))
    return _take_model(recipe, given, stored.model)


def _take_model(recipe: Recipe, given: set[str], model: ModelConfig) -> set[str]:
    """Returns the keys that `model` determines."""
    keys = set()
    for setting in iter_settings(model, "model."):
        keys.add(setting.key)
        if setting.key not in given:
            *parents, name = setting.key.split(".")
            section: Any = recipe
            for parent in parents:
                section = getattr(section, parent)
            setattr(section, name, setting.value)
    return keys
