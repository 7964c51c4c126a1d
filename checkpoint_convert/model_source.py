"""Anything that weights are read from: a Hugging Face folder of a known layout, a Megatron checkpoint, a projector.

Whatever it is, its tensors come one at a time and under the same names, the Hugging Face side of the name map.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import model_from_llava_next, read_config
from checkpoint_convert.huggingface.instellavl import model_from_instellavl
from checkpoint_convert.huggingface.llava_onevision import model_from_llava_onevision
from checkpoint_convert.huggingface.safetensors import FolderTensors
from checkpoint_convert.mapping.families import LANGUAGES, TOWERS, TWO_TOWERS, language_from_hf, vision_from_hf
from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, name_map
from checkpoint_convert.megatron.files import checkpoint_recipe, checkpoint_tensors
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.model import IMAGE_MEAN_STD
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.training.checkpoint import TRACKER

PARTS = {
    "vision": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "language": ("language_model.",),
}
"""How the names of a part's tensors begin."""
MEGATRON = "Megatron checkpoint"
LAYOUTS = ("llava_next", "llava_onevision", "instellavl")
"""model_type of a whole VLM."""
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")


@dataclass(frozen=True)
class Source:
    """One such thing, opened."""

    path: Path
    kind: str
    """One of LAYOUTS, MEGATRON, a tower's or decoder's model_type, or `projector`."""
    tensors: StoredTensors
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    model: ModelConfig | None = None
    """Of a whole VLM; `vision` and `language` are its own then."""
    aspect_ratio: str = "anyres"
    """How a whole VLM cuts images."""

    @property
    def parts(self) -> list[str]:
        """Which of PARTS it has."""
        has = {"vision": self.vision, "projector": self.model or self.kind == "projector", "language": self.language}
        return [part for part in PARTS if has[part]]

    @property
    def tokenizer(self) -> Path:
        """Where its tokenizer is, if it has one."""
        return self.path / "tokenizer" if self.kind == MEGATRON else self.path


def open_source(path: Path) -> Source:
    """Open a whole VLM, a tower, a decoder, or a projector: mm_projector.bin, the same as safetensors, or its folder.

    Raises ConversionError where `path` is none of these, or one that cannot be read or computed.
    """
    if (path / TRACKER).is_file():
        recipe = checkpoint_recipe(path)
        tensors = HuggingFaceTensors(name_map(recipe.model), checkpoint_tensors(path), str(path))
        return _whole(path, MEGATRON, tensors, recipe.model, recipe.data.image_aspect_ratio)
    files = [path] if path.is_file() else [path / name for name in _PROJECTOR_FILES if (path / name).is_file()]
    if files:
        return Source(path, "projector", FolderTensors(files[0], "projector"))
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"{path} is no model: it has neither config.json, as a Hugging Face folder, nor {TRACKER}, as a "
            "Megatron checkpoint"
        )
    config, source = read_config(path), str(path / "config.json")
    kind = str(config.get("model_type"))
    if kind in LANGUAGES:
        language = language_from_hf(config, source)
        return Source(path, kind, _without_tied_head(FolderTensors(path, "language"), language), language=language)
    if kind in TOWERS or kind in TWO_TOWERS:
        return Source(path, kind, FolderTensors(path, "vision"), vision=vision_from_hf(config, source))
    model, aspect_ratio = describe_whole(path, config)
    return _whole(path, kind, whole_tensors(path, config, model), model, aspect_ratio)


def describe_whole(folder: Path, config: dict[str, Any], words: int | None = None) -> tuple[ModelConfig, str]:
    """The model of a whole VLM's folder, and its image_aspect_ratio.

    `words` is the length of its tokenizer, by default of the one inside the folder. Raises ConversionError for another
    kind of model, or one that this model does not compute.
    """
    source, kind = str(folder / "config.json"), config.get("model_type")
    if kind not in LAYOUTS:
        raise ConversionError(f"{source}: model_type is {kind!r}; supported: {', '.join(map(repr, LAYOUTS))}")
    if kind == "instellavl":
        index = config.get("image_token_index", words)
        return model_from_instellavl(config, source, _words(folder) if index is None else index)
    if kind == "llava_onevision":
        model, aspect_ratio = model_from_llava_onevision(config, source)
    else:
        model, aspect_ratio = model_from_llava_next(config, source), "anyres"
    return replace(model, vision=_with_colours_of_processor(model.vision, folder)), aspect_ratio


def whole_tensors(folder: Path, config: dict[str, Any], model: ModelConfig) -> FolderTensors:
    """The tensors of a whole VLM's folder; `model` is what describe_whole says."""
    dialect = "instellavl" if config["model_type"] == "instellavl" else "whole"
    return _without_tied_head(FolderTensors(folder, dialect), model.language)


def _whole(path: Path, kind: str, tensors: StoredTensors, model: ModelConfig, aspect_ratio: str) -> Source:
    return Source(path, kind, tensors, model.vision, model.language, model, aspect_ratio)


def _without_tied_head(tensors: FolderTensors, language: LanguageConfig) -> FolderTensors:
    if language.tie_word_embeddings:
        tensors.discard("language_model.lm_head.weight")  # some writers store the embedding twice
    return tensors


def _words(folder: Path) -> int:
    try:
        return len(load_tokenizer(folder))
    except DataError as error:
        raise ConversionError(str(error)) from error


def _with_colours_of_processor(vision: VisionConfig, folder: Path) -> VisionConfig:
    """Pixels are normalised as the folder's image processor says; without one, as the tower was published."""
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if not (folder / name).is_file():
            continue
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        config = config.get(section) or {} if section else config
        if "image_mean" not in config:
            continue
        colours = tuple(config["image_mean"]), tuple(config.get("image_std", ()))
        for known, values in IMAGE_MEAN_STD.items():
            if colours == values:
                return replace(vision, image_normalization=known)
        raise ConversionError(
            f"{folder / name} normalises pixels by image_mean {colours[0]} and image_std {colours[1]}; supported: "
            + " and ".join(f"{mean}, {std}" for mean, std in IMAGE_MEAN_STD.values())
        )
    return vision
