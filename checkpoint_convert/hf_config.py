"""Model configs: transformers' config.json <-> ours. What a config asks for and the model cannot do is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint_convert.errors import ConversionError, some_of
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig

OLMO_NORM_EPS = 1e-5
"""transformers' OLMo has it in its code, not in its config."""
MAX_GRID = 5
"""Tiles along the longer side of the default resolutions of a model that is put together of two parts."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{file} is not there: {folder} is no Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{file} is not JSON: {error}") from error
    return config


class _Reader:
    """Reads a config section with transformers' defaults, and collects what the model cannot do."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config, self.source = config, source
        self.problems: list[str] = []

    def get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def require(self, name: str, default: Any, *allowed: Any) -> Any:
        value = self.config.get(name, default)
        if value not in allowed:
            self.problems.append(f"{name} is {value!r}; supported: {', '.join(map(repr, allowed))}")
        return value

    def finish(self) -> None:
        if self.problems:
            raise ConversionError(f"{self.source} asks for what this model cannot do\n{some_of(self.problems)}")


def vision_from_hf(config: dict[str, Any], source: str, feature_layer: int = -2) -> VisionConfig:
    """A CLIPVisionConfig (or the CLIPConfig around one) as ours. Defaults are transformers' own."""
    if config.get("model_type") == "clip":
        config = config.get("vision_config") or {}
    reader = _Reader(config, source)
    reader.require("model_type", "clip_vision_model", "clip_vision_model")
    reader.require("num_channels", 3, 3)
    layers = reader.get("num_hidden_layers", 12)
    feature_layer = feature_layer if feature_layer < 0 else feature_layer - layers - 1
    vision = VisionConfig(
        hidden_size=reader.get("hidden_size", 768),
        intermediate_size=reader.get("intermediate_size", 3072),
        num_hidden_layers=layers,
        num_attention_heads=reader.get("num_attention_heads", 12),
        image_size=reader.get("image_size", 224),
        patch_size=reader.get("patch_size", 32),
        layer_norm_eps=reader.get("layer_norm_eps", 1e-5),
        hidden_act=reader.require("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
        vision_feature_layer=feature_layer,
    )
    if not 1 <= vision.num_layers_used <= layers:
        reader.problems.append(f"vision_feature_layer is {feature_layer}; the tower has {layers} layers")
    reader.finish()
    return vision


def language_from_hf(config: dict[str, Any], source: str) -> LanguageConfig:
    """An OlmoConfig as ours. Defaults are transformers' own."""
    reader = _Reader(config, source)
    reader.require("model_type", None, "olmo")
    reader.require("hidden_act", "silu", "silu")
    reader.require("attention_bias", False, False)
    reader.require("clip_qkv", None, None)
    reader.require("rope_scaling", None, None)
    rope = reader.get("rope_parameters", {})
    if rope.get("rope_type", "default") != "default":
        reader.problems.append(f"rope_parameters.rope_type is {rope['rope_type']!r}; supported: 'default'")
    heads = reader.get("num_attention_heads", 32)
    language = LanguageConfig(
        hidden_size=reader.get("hidden_size", 4096),
        intermediate_size=reader.get("intermediate_size", 11008),
        num_hidden_layers=reader.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=reader.get("num_key_value_heads", heads),
        vocab_size=reader.get("vocab_size", 50304),
        rope_theta=float(rope.get("rope_theta", reader.get("rope_theta", 10000.0))),
        layer_norm_eps=OLMO_NORM_EPS,
        tie_word_embeddings=reader.get("tie_word_embeddings", False),
        max_position_embeddings=reader.get("max_position_embeddings", 2048),
    )
    reader.finish()
    return language


def model_from_parts(vision: VisionConfig, language: LanguageConfig, image_token_index: int) -> ModelConfig:
    """A tower and a language model as one VLM, tiled at strips of up to five tiles and at 2 x 2."""
    side = vision.image_size
    strips = [[side, side * count] for count in range(1, MAX_GRID + 1)]
    pinpoints = [*strips, [2 * side, side], [2 * side, 2 * side], *([height, width] for width, height in strips[2:])]
    return ModelConfig(vision, language, image_token_index, pinpoints)


def model_from_llava_next(config: dict[str, Any], source: str) -> ModelConfig:
    """A LlavaNextConfig as ours. Its resolutions are (height, width), ours (width, height), in the same order: the
    first of equals is taken."""
    reader = _Reader(config, source)
    reader.require("model_type", None, "llava_next")
    reader.require("projector_hidden_act", "gelu", "gelu")
    reader.require("multimodal_projector_bias", True, True)
    reader.require("vision_feature_select_strategy", "default", "default")
    feature_layer = reader.get("vision_feature_layer", -2)
    if not isinstance(feature_layer, int):
        reader.problems.append(f"vision_feature_layer is {feature_layer}; supported: one layer")
    if not config.get("image_grid_pinpoints"):
        reader.problems.append("image_grid_pinpoints is missing")
    reader.finish()
    text = config.get("text_config") or {}
    # transformers 5 goes by the outer flag, 4 by the inner; files of either version set the inner one.
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return ModelConfig(
        vision=vision_from_hf(config.get("vision_config") or {}, f"{source}: vision_config", feature_layer),
        language=language_from_hf(text, f"{source}: text_config"),
        image_token_index=reader.get("image_token_index", reader.get("image_token_id", 32000)),
        image_grid_pinpoints=[[width, height] for height, width in config["image_grid_pinpoints"]],
    )


def llava_next_config(model: ModelConfig, eos_id: int, pad_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a LlavaNextForConditionalGeneration, in the spelling that transformers 4 and 5 both read."""
    vision, language = model.vision, model.language
    if language.layer_norm_eps != OLMO_NORM_EPS:
        raise ConversionError(
            f"model.language.layer_norm_eps is {language.layer_norm_eps}, but transformers' OLMo always uses "
            f"{OLMO_NORM_EPS}: the exported model would compute something else"
        )
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
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.tie_word_embeddings,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": vision.hidden_act,
        },
        "text_config": {
            "architectures": ["OlmoForCausalLM"],
            "model_type": "olmo",
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_hidden_layers,
            "num_attention_heads": language.num_attention_heads,
            "num_key_value_heads": language.num_key_value_heads,
            "vocab_size": language.vocab_size,
            "max_position_embeddings": language.max_position_embeddings,
            "rope_theta": language.rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "clip_qkv": None,
            "tie_word_embeddings": language.tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
        },
    }
