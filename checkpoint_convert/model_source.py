"""Opens a source of weights: a Hugging Face folder of any supported format, a Megatron checkpoint, or a projector.

The tensors of every source are read one at a time, under the parameter map's Hugging Face names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import read_config
from checkpoint_convert.huggingface.safetensors import FolderTensors
from checkpoint_convert.mapping.families import LANGUAGES, TEXT_AND_VISION, TOWERS, language_from_hf, vision_from_hf
from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, param_map
from checkpoint_convert.megatron.files import checkpoint_recipe, checkpoint_tensors
from checkpoint_convert.model_config import VLM_FORMATS as VLM_FORMATS
from checkpoint_convert.model_config import vlm_config
from megatron_vlm.config import PARTS, LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.training.checkpoint import TRACKER

MEGATRON = "Megatron checkpoint"
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")


@dataclass(frozen=True)
class Source:
    """A source of weights: a whole VLM or one part of it."""

    path: Path
    format: str
    """One of VLM_FORMATS, MEGATRON, the model_type of a tower or language model, or `projector`."""
    tensors: StoredTensors
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    model: ModelConfig | None = None
    """Only of a whole VLM; `vision` and `language` are then parts of it."""
    aspect_ratio: str = "anyres"
    """image_aspect_ratio of a whole VLM."""

    @property
    def parts(self) -> list[str]:
        """Those of PARTS that the source has."""
        has = {"vision": self.vision, "projector": self.model or self.format == "projector", "language": self.language}
        return [part for part in PARTS if has[part]]

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer, if the source has one."""
        return self.path / "tokenizer" if self.format == MEGATRON else self.path


def open_source(path: Path, tokenizer: Path | None = None) -> Source:
    """Open a whole VLM, a vision tower, a language model or a projector.

    Args:
        path: folder, or file of a projector (mm_projector.bin or .safetensors).
        tokenizer: used in place of the folder's own where a config without image_token_index leaves the id to it.

    Raises:
        ConversionError: `path` is none of these, cannot be read, or has settings that are not supported.
    """
    if (path / TRACKER).is_file():
        recipe = checkpoint_recipe(path)
        stored = HuggingFaceTensors(param_map(recipe.model), checkpoint_tensors(path), str(path))
        return _vlm(path, MEGATRON, stored, recipe.model, recipe.data.image_aspect_ratio)
    files = [path] if path.is_file() else [path / name for name in _PROJECTOR_FILES if (path / name).is_file()]
    if files:
        return Source(path, "projector", FolderTensors(files[0], "projector"))
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"{path} is not a model: it has neither config.json, as a Hugging Face folder, nor {TRACKER}, as a "
            "Megatron checkpoint. Give a folder of one of these"
        )
    config = read_config(path)
    format, source = str(config.get("model_type")), str(path / "config.json")
    if format in LANGUAGES:
        language = language_from_hf(config, source)
        return Source(path, format, _without_tied_head(FolderTensors(path, "language"), language), language=language)
    if format in TOWERS or format in TEXT_AND_VISION:
        return Source(path, format, FolderTensors(path, "vision"), vision=vision_from_hf(config, source))
    if format not in VLM_FORMATS:
        supported = map(repr, (*VLM_FORMATS, *TOWERS, *TEXT_AND_VISION, *LANGUAGES))
        raise ConversionError(f"{source}: model_type is {format!r}; supported: {', '.join(supported)}")
    model, aspect_ratio = vlm_config(path, config, tokenizer or path)
    tensors = FolderTensors(path, "instellavl" if format == "instellavl" else "llava")
    return _vlm(path, format, _without_tied_head(tensors, model.language), model, aspect_ratio)


def _vlm(path: Path, format: str, tensors: StoredTensors, model: ModelConfig, aspect_ratio: str) -> Source:
    return Source(path, format, tensors, model.vision, model.language, model, aspect_ratio)


def _without_tied_head(tensors: FolderTensors, language: LanguageConfig) -> FolderTensors:
    if language.tie_word_embeddings:
        tensors.discard("language_model.lm_head.weight")  # some writers store the embedding twice
    return tensors
