"""Model configs: transformers' config.json <-> ours. A setting that is not supported is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.mapping.families import (
    TOWERS,
    Problems,
    check_pinpoints,
    language_from_hf,
    to_hf_config,
    vision_from_hf,
)
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.model import IMAGE_MEAN_STD

MAX_GRID = 5
"""Most tiles along one side, in the default resolutions of a model that is joined from two parts."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises ConversionError if there is none, or it cannot be read."""
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder / 'config.json'} does not exist: {folder} is not a Hugging Face model folder")
    return read_json(folder / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The settings of a JSON file. Raises ConversionError if it is something else."""
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ConversionError(f"{file} is not JSON: {error}. Download it again") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file} holds no settings: it must be one JSON object. Download it again")
    return config


def model_from_parts(vision: VisionConfig, language: LanguageConfig, image_token_index: int) -> ModelConfig:
    """A vision tower and a language model as one VLM with resolutions of 1 x n and n x 1 tiles, n <= 5, and 2 x 2."""
    side = vision.image_size
    strips = [[side, side * count] for count in range(1, MAX_GRID + 1)]
    pinpoints = [*strips, [2 * side, side], [2 * side, 2 * side], *([height, width] for width, height in strips[2:])]
    return ModelConfig(vision, language, image_token_index, pinpoints)


def model_from_llava_next(config: dict[str, Any], source: str) -> ModelConfig:
    """A LlavaNextConfig as ours; raises ConversionError for settings that are not supported.

    Its resolutions are (height, width), ours (width, height). The order is kept: the first of equals is chosen.
    """
    problems = Problems(source)
    problems.require(config, "model_type", None, "llava_next")
    problems.require(config, "projector_hidden_act", "gelu", "gelu")
    problems.require(config, "multimodal_projector_bias", True, True)
    feature_layer = config.get("vision_feature_layer", -2)
    if type(feature_layer) is not int:
        problems.found.append(f"vision_feature_layer is {feature_layer}; supported: one layer")
    image_token_index = config.get("image_token_index", config.get("image_token_id", 32000))
    if type(image_token_index) is not int:
        problems.found.append(f"image_token_index is {image_token_index!r}; expected the id of a token")
    check_pinpoints(config.get("image_grid_pinpoints"), problems)
    vision = vision_from_hf(problems.section(config, "vision_config"), f"{source}: vision_config", feature_layer)
    strategy = TOWERS[vision.model_type].select_strategy
    problems.require(config, "vision_feature_select_strategy", "default", strategy)
    problems.raise_if_any()
    # transformers 5 reads the outer flag, 4 the inner one; files of both versions have the inner one.
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", False)}
    text = tied | problems.section(config, "text_config")
    return ModelConfig(
        vision=vision,
        language=language_from_hf(text, f"{source}: text_config"),
        image_token_index=image_token_index,
        image_grid_pinpoints=[[width, height] for height, width in config["image_grid_pinpoints"]],
    )


def llava_next_config(model: ModelConfig, eos_id: int, pad_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a LlavaNextForConditionalGeneration, in the form that transformers 4 and 5 both read."""
    vision, language = model.vision, model.language
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "torch_dtype": dtype,
        "image_token_index": model.image_token_index,
        "image_grid_pinpoints": [[height, width] for width, height in model.image_grid_pinpoints],
        "image_seq_length": vision.patches_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.vision_feature_layer,
        "vision_feature_select_strategy": TOWERS[vision.model_type].select_strategy,
        "tie_word_embeddings": language.tie_word_embeddings,
        "vision_config": to_hf_config(vision),
        "text_config": to_hf_config(language) | {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id},
    }


def with_image_normalization(vision: VisionConfig, folder: Path) -> VisionConfig:
    """The vision config with the image mean and std of the folder's image processor, if it has one.

    Raises ConversionError if they are not one of the supported pairs.
    """
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name)
        config = Problems(str(folder / name)).section(config, section) if section else config
        if "image_mean" not in config:
            continue
        image_mean, image_std = (
            tuple(value) if isinstance(value, list) else value
            for value in (config["image_mean"], config.get("image_std"))
        )
        for known, values in IMAGE_MEAN_STD.items():
            if (image_mean, image_std) == values:
                return replace(vision, image_normalization=known)
        raise ConversionError(
            f"{folder / name} normalises pixels by image_mean {image_mean} and image_std {image_std}; supported: "
            + " and ".join(f"{mean}, {std}" for mean, std in IMAGE_MEAN_STD.values())
        )
    return vision
