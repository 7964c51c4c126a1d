"""The `instellavl` format: its config, and the files beside the weights. Its tensor names are in mapping/hf_names.py.

A folder holds a copy of the package `instellavl`, so that transformers loads it with trust_remote_code and downloads
nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import instellavl
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import llava_next_config
from checkpoint_convert.huggingface.tokenizer import export_tokenizer
from checkpoint_convert.mapping.families import Problems, check_pinpoints, language_from_hf, vision_from_hf
from instellavl.constants import CLIP_MEAN, CLIP_STD, END_OF_TURN
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.tokenizer import Tokenizer

REMOTE_CODE = (
    "configuration_instellavl.py",
    "constants.py",
    "conversation.py",
    "image_processing_instellavl.py",
    "mm_utils.py",
    "modeling_instellavl.py",
    "processing_instellavl.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_instellavl.InstellaVLConfig",
    "AutoModelForCausalLM": "modeling_instellavl.InstellaVLForCausalLM",
    "AutoImageProcessor": "image_processing_instellavl.InstellaVLImageProcessor",
    "AutoProcessor": "processing_instellavl.InstellaVLProcessor",
}
_MERGE_TYPES = {"anyres": "spatial_unpad", "square": "flat", "pad": "flat"}
_CLIP_L = "openai/clip-vit-large-patch14-336"


def write_configs(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, aspect_ratio: str
) -> None:
    """Write everything but the weights into `folder`: configs, tokenizer, and the code itself.

    Args:
        folder: the folder of the export.
        model: a CLIP tower and an OLMo language model.
        tokenizer: the checkpoint's.
        dtype: dtype of the weights.
        aspect_ratio: anyres, square or pad: how images were tiled in training.

    Raises:
        ConversionError: another tower or language model, or a tokenizer without the template's end-of-turn string.
    """
    config = _config(model, tokenizer, str(dtype).removeprefix("torch."), aspect_ratio)
    export_tokenizer(tokenizer, model, folder, processor_class="InstellaVLProcessor", image_token=False)
    written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: written[name] for name in ("eos_token", "pad_token")}
    if special["eos_token"] != END_OF_TURN:
        raise ConversionError(
            f"the end-of-sequence token of {tokenizer.path} is {special['eos_token']!r}; the published template opens "
            f"and closes turns with {END_OF_TURN!r}. Export with --format llava_next, whose template uses the token id"
        )
    processor = {"processor_class": "InstellaVLProcessor", "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
    image_processor = {
        "image_processor_type": "InstellaVLImageProcessor",
        **processor,
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")},
        "image_size": model.vision.image_size,
        **{name: config[name] for name in ("image_aspect_ratio", "image_grid_pinpoints", "image_mean", "image_std")},
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}),
        ("special_tokens_map.json", special),
        ("processor_config.json", processor),
        ("preprocessor_config.json", image_processor),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in REMOTE_CODE:
        shutil.copyfile(Path(instellavl.__path__[0]) / name, folder / name)


def _config(model: ModelConfig, tokenizer: Tokenizer, dtype: str, aspect_ratio: str) -> dict[str, Any]:
    """config.json: OLMo's fields, those that the code reads, and those that only record the published training."""
    stock = llava_next_config(model, tokenizer.eos_id, tokenizer.pad_id, dtype)
    tower, decoder = stock["vision_config"], stock["text_config"]
    if (tower["model_type"], decoder["model_type"]) != ("clip_vision_model", "olmo"):
        raise ConversionError(
            f"the instellavl format needs a CLIP tower and an OLMo language model, not {tower['model_type']} and "
            f"{decoder['model_type']}: export with --format llava_next"
        )
    if aspect_ratio not in _MERGE_TYPES:
        raise ConversionError(
            f"the instellavl format has no image_aspect_ratio = {aspect_ratio}, only {', '.join(_MERGE_TYPES)}"
        )
    return {
        **decoder,
        "architectures": ["InstellaVLForCausalLM"],
        "model_type": "instellavl",
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModelForCausalLM")},
        "torch_dtype": dtype,
        "vision_config": tower,
        "image_token_index": model.image_token_index,
        "image_aspect_ratio": aspect_ratio,
        "image_grid_pinpoints": model.image_grid_pinpoints,
        "image_crop_resolution": model.vision.image_size,
        "image_split_resolution": None,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
        "mm_vision_tower": _CLIP_L,
        "vision_tower_pretrained": None,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "use_mm_proj": True,
        "mm_vision_select_layer": model.vision.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": _MERGE_TYPES[aspect_ratio],
        "mm_newline_position": "one_token",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": None,
        "mm_vision_tower_lr": None,
        "online_training": True,
        "use_pos_skipping": False,
        "pos_skipping_range": 4096,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": model.language.max_position_embeddings,
    }


def model_from_instellavl(config: dict[str, Any], source: str, image_token_index: int) -> tuple[ModelConfig, str]:
    """An InstellaVLConfig as ours, and its image_aspect_ratio.

    Args:
        config: config.json; without a vision_config the tower is ViT-L/14-336, which mm_vision_tower must name then.
        source: name of the file in errors.
        image_token_index: used if the config has none, as the published one; the tokenizer's length.

    Raises:
        ConversionError: settings that are not supported.
    """
    aspect_ratio = str(config.get("image_aspect_ratio", "anyres"))
    merge_type = config.get("mm_patch_merge_type", "spatial_unpad")
    problems = Problems(source)
    supported = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
        "mm_resampler_type": (None,),
        "image_mean": (list(CLIP_MEAN),),
        "image_std": (list(CLIP_STD),),
        "image_aspect_ratio": tuple(_MERGE_TYPES),
        "mm_patch_merge_type": (_MERGE_TYPES.get(aspect_ratio, merge_type),),
    }
    for name, allowed in supported.items():
        problems.require(config, name, allowed[0], *allowed)
    tower = problems.section(config, "vision_config")
    if not tower and not str(config.get("mm_vision_tower", "")).endswith(_CLIP_L.split("/")[1]):
        problems.found.append(f"vision_config is missing, and mm_vision_tower is {config.get('mm_vision_tower')!r}")
    check_pinpoints(config.get("image_grid_pinpoints"), problems)
    index, layer = config.get("image_token_index", image_token_index), config.get("mm_vision_select_layer", -2)
    for name, value in (("image_token_index", index), ("mm_vision_select_layer", layer)):
        if type(value) is not int:
            problems.found.append(f"{name} is {value!r}; expected a whole number")
    if config.get("tokenizer_model_max_length") is not None:
        problems.require_like("tokenizer_model_max_length", config["tokenizer_model_max_length"], 4096)
    problems.raise_if_any()
    default_tower = llava_next_config(ModelConfig(), 0, 0, "float32")["vision_config"]  # ModelConfig's is ViT-L/14-336
    language = language_from_hf({**config, "model_type": "olmo"}, source)
    language.max_position_embeddings = config.get("tokenizer_model_max_length") or language.max_position_embeddings
    vision = vision_from_hf(
        {"model_type": "clip_vision_model", **(tower or default_tower)},
        f"{source}: vision_config",
        layer,
    )
    pinpoints = [list(point) for point in config["image_grid_pinpoints"]]
    return ModelConfig(vision, language, index, pinpoints), aspect_ratio
