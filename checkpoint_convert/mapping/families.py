"""The supported families of vision towers and language models, and how their configs translate to ours and back.

All language models here have Llama's architecture (pre-norm, SwiGLU, rotary embedding in halves) and all towers CLIP's.
A family states what it fixes, which names its config.json uses, and transformers' defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint_convert.errors import ConversionError, some_of
from megatron_vlm.config import LanguageConfig, VisionConfig
from megatron_vlm.config.model import ImageNormalization


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    architecture: str
    """transformers' class."""
    fixed: Mapping[str, Any]
    """Our settings that are the same for the whole family and absent from config.json."""
    defaults: Mapping[str, Any]
    """transformers' settings and their defaults, for those that config.json leaves out."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our name -> transformers' name, where they differ."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other settings that change the computation: (transformers' default, supported values); others are an error."""
    select_strategy: str = "default"
    """Of a tower, vision_feature_select_strategy: "default" drops the class token, "full" keeps every token."""


_RMS = {"layer_norm_eps": "rms_norm_eps"}
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
LANGUAGES = {
    "olmo": Family(
        architecture="OlmoForCausalLM",
        fixed={"normalization": "LayerNorm", "attention_bias": False, "layer_norm_eps": 1e-5, "head_dim": None},
        defaults=_SIZES | {"intermediate_size": 11008, "vocab_size": 50304, "max_position_embeddings": 2048},
        required={"attention_bias": (False, False), "clip_qkv": (None, None), "hidden_act": ("silu", "silu")},
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        fixed={"normalization": "RMSNorm", "attention_bias": False},
        defaults=_SIZES
        | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048}
        | {"rms_norm_eps": 1e-6, "head_dim": None},
        names=_RMS,
        required={"attention_bias": (False, False), "mlp_bias": (False, False), "hidden_act": ("silu", "silu")},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        fixed={"normalization": "RMSNorm", "attention_bias": False},
        defaults=_SIZES
        | {"intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 131072}
        | {"rms_norm_eps": 1e-6, "head_dim": None, "num_key_value_heads": 8},
        names=_RMS,
        required={"sliding_window": (4096, None), "hidden_act": ("silu", "silu")},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"normalization": "RMSNorm", "attention_bias": True, "head_dim": None},
        defaults=_SIZES
        | {"intermediate_size": 22016, "vocab_size": 151936, "max_position_embeddings": 32768}
        | {"rms_norm_eps": 1e-6, "num_key_value_heads": 32},
        names=_RMS,
        required={"use_sliding_window": (False, False), "hidden_act": ("silu", "silu")},
    ),
}

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOWERS = {
    "clip_vision_model": Family(
        architecture="CLIPVisionModel",
        fixed={"class_token": True, "pre_norm": True, "patch_bias": False, "pooling_head": False},
        defaults=_BASE | {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        required={"num_channels": (3, 3)},
    ),
    "siglip_vision_model": Family(
        architecture="SiglipVisionModel",
        fixed={"class_token": False, "pre_norm": False, "patch_bias": True},
        defaults=_BASE
        | {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
        | {"vision_use_head": True},
        names={"pooling_head": "vision_use_head"},
        required={"num_channels": (3, 3)},
        select_strategy="full",
    ),
}
_NORMALIZATIONS: dict[str, ImageNormalization] = {
    "clip_vision_model": "openai_clip",
    "siglip_vision_model": "imagenet_standard",
}
"""The image_normalization that each family was trained with."""
TEXT_AND_VISION = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


class Problems:
    """Settings of a config that this model does not support, collected and reported together."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []

    def require(self, config: Mapping[str, Any], name: str, default: Any, *allowed: Any) -> Any:
        value = config.get(name, default)
        if value not in allowed:
            self.found.append(f"{name} is {value!r}; supported: {', '.join(map(repr, allowed))}")
        return value

    def require_like(self, name: str, value: Any, example: Any) -> None:
        """A truth value, a whole number or a number as `example` is; numbers above 0."""
        if isinstance(example, bool):
            right, expected = isinstance(value, bool), "true or false"
        elif isinstance(example, int):
            right, expected = type(value) is int and value > 0, "a whole number above 0"
        else:
            right, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
        if not right:
            self.found.append(f"{name} is {value!r}; expected {expected}")

    def section(self, config: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A part of a config, empty if it is absent or null."""
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            self.found.append(f"{name} is {value!r}; expected settings in braces")
        self.raise_if_any()
        return value or {}

    def raise_if_any(self) -> None:
        if self.found:
            raise ConversionError(f"{self.source} has settings that are not supported\n{some_of(self.found)}")


def check_pinpoints(pinpoints: Any, problems: Problems) -> None:
    """Add a problem unless image_grid_pinpoints is a list of pairs of pixels."""
    pairs = isinstance(pinpoints, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(pixels) is int for pixels in pair)
        for pair in pinpoints
    )
    if not pairs or not pinpoints:
        problems.found.append(f"image_grid_pinpoints is {pinpoints!r}; expected pairs of pixels, such as [[336, 672]]")


def _read(
    config: dict[str, Any], families: Mapping[str, Family], problems: Problems
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our settings that the family fixes or names, all of transformers' settings with defaults)."""
    model_type = problems.require(config, "model_type", None, *families)
    problems.raise_if_any()
    family = families[model_type]
    given = {name: value for name, value in config.items() if value is not None}
    values = dict(family.defaults) | given
    examples = {**family.defaults, "head_dim": 64, "num_key_value_heads": 8, "rope_theta": 1e4}
    for name, example in examples.items():
        if isinstance(example, int | float) and values.get(name) is not None:
            problems.require_like(name, values[name], example)
    problems.raise_if_any()
    for name, (default, *allowed) in family.required.items():
        problems.require(config, name, default, *allowed)
    ours = {"model_type": model_type, **family.fixed}
    ours |= {name: values[theirs] for name, theirs in family.names.items()}
    ours |= {name: values[name] for name in family.defaults if name not in family.names.values() and name not in ours}
    return ours, values


def language_from_hf(config: dict[str, Any], source: str) -> LanguageConfig:
    """A language model's config.json as ours. Raises ConversionError for settings that are not supported."""
    problems = Problems(source)
    settings, values = _read(config, LANGUAGES, problems)
    problems.require(config, "rope_scaling", None, None)
    rope = problems.section(config, "rope_parameters")
    if rope.get("rope_type", "default") != "default":
        problems.found.append(f"rope_parameters.rope_type is {rope['rope_type']!r}; supported: 'default'")
    if "rope_theta" in rope:
        problems.require_like("rope_parameters.rope_theta", rope["rope_theta"], 1e4)
    problems.raise_if_any()
    settings["rope_theta"] = float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    settings["num_key_value_heads"] = values.get("num_key_value_heads", values["num_attention_heads"])
    problems.raise_if_any()
    if settings["head_dim"] == settings["hidden_size"] // settings["num_attention_heads"]:
        settings["head_dim"] = None  # transformers 5 writes it even if it is the default
    return LanguageConfig(**settings)


def vision_from_hf(config: dict[str, Any], source: str, feature_layer: int = -2) -> VisionConfig:
    """The config.json of a vision tower, or of CLIP or SigLIP around it, as ours; errors as in language_from_hf."""
    problems = Problems(source)
    tower = TEXT_AND_VISION.get(str(config.get("model_type")))
    if tower:
        config = {"model_type": tower} | problems.section(config, "vision_config")
    settings, values = _read({"model_type": "clip_vision_model"} | config, TOWERS, problems)
    problems.require(values, "hidden_act", None, *_ACTIVATIONS)
    layers = settings["num_hidden_layers"]
    feature_layer = feature_layer if feature_layer < 0 else feature_layer - layers - 1
    normalization = _NORMALIZATIONS[settings["model_type"]]
    vision = VisionConfig(vision_feature_layer=feature_layer, image_normalization=normalization, **settings)
    if not 1 <= vision.num_layers_used <= layers:
        problems.found.append(f"vision_feature_layer is {feature_layer}; the tower has {layers} layers")
    problems.raise_if_any()
    return vision


def to_hf_config(part: LanguageConfig | VisionConfig) -> dict[str, Any]:
    """The config.json of a language model or vision tower, in the form that transformers 4 and 5 both read.

    Raises ConversionError if a setting differs from what the family fixes: transformers would compute something else.
    """
    families, section = (LANGUAGES, "language") if isinstance(part, LanguageConfig) else (TOWERS, "vision")
    family = families[part.model_type]
    for name, value in family.fixed.items():
        if getattr(part, name) != value:
            raise ConversionError(
                f"model.{section}.{name} is {getattr(part, name)}, but transformers' {part.model_type} always uses "
                f"{value}: the exported model would compute something else"
            )
    ours = {theirs: name for name, theirs in family.names.items()}
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": part.model_type}
    config |= {name: getattr(part, ours.get(name, name)) for name in family.defaults}
    config |= {name: allowed for name, (_, allowed, *_) in family.required.items()}
    if isinstance(part, LanguageConfig):
        config |= {"num_key_value_heads": part.num_key_value_heads, "rope_theta": part.rope_theta}
        if "head_dim" in config:
            config["head_dim"] = part.head_width
    return config
