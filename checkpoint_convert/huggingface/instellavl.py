"""The published layout, `instellavl`: its config, and the files beside the weights (their names are in names.py).

A folder brings its own code (the package `instellavl` of this repository, copied), so that transformers loads it with
trust_remote_code and fetches nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import instellavl
from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.config import language_from_hf, llava_next_config, vision_from_hf
from checkpoint_convert.huggingface.tokenizer import export_tokenizer
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


def write_companions(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, aspect_ratio: str
) -> None:
    """Write everything but the weights into `folder`: configs, tokenizer, and the code itself.

    Args:
        folder: the export that is being made.
        model: a CLIP tower and an OLMo decoder.
        tokenizer: of the checkpoint.
        dtype: of the weights.
        aspect_ratio: anyres, square or pad: how images were cut in training.

    Raises:
        ConversionError: another tower or decoder, or a tokenizer without the template's end-of-turn string.
    """
    config = _config(model, tokenizer, str(dtype).removeprefix("torch."), aspect_ratio)
    export_tokenizer(tokenizer, model, folder, processor_class="InstellaVLProcessor", image_token=False)
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: names[name] for name in ("eos_token", "pad_token")}
    if special["eos_token"] != END_OF_TURN:
        raise ConversionError(
            f"the end-of-sequence token of {tokenizer.path} is {special['eos_token']!r}; the published template opens "
            f"and closes turns with {END_OF_TURN!r}. Export with --format llava_next, whose template goes by the id"
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
    """config.json: OLMo's fields, what the code goes by, and what the published training wrote for the record."""
    stock = llava_next_config(model, tokenizer.eos_id, tokenizer.pad_id, dtype)
    tower, decoder = stock["vision_config"], stock["text_config"]
    if (tower["model_type"], decoder["model_type"]) != ("clip_vision_model", "olmo"):
        raise ConversionError(
            f"the published layout is a CLIP tower and an OLMo decoder, not {tower['model_type']} and "
            f"{decoder['model_type']}: export with --format llava_next"
        )
    if aspect_ratio not in _MERGE_TYPES:
        raise ConversionError(
            f"the published layout has no image_aspect_ratio = {aspect_ratio}, only {', '.join(_MERGE_TYPES)}"
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
    """An InstellaVLConfig as ours, and how it cuts images.

    Args:
        config: config.json; without a vision_config the tower is ViT-L/14-336, as it says by name only.
        source: names the file in errors.
        image_token_index: for a config that does not say it, as the published one: the tokenizer's length.

    Raises:
        ConversionError: what this model does not compute.
    """
    aspect_ratio = config.get("image_aspect_ratio", "anyres")
    merge_type = config.get("mm_patch_merge_type", "spatial_unpad")
    required = {
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
    problems = [
        f"{name} is {config[name]!r}; supported: {', '.join(map(repr, allowed))}"
        for name, allowed in required.items()
        if name in config and config[name] not in allowed
    ]
    tower = config.get("vision_config")
    if tower is None and not str(config.get("mm_vision_tower", "")).endswith(_CLIP_L.split("/")[1]):
        problems.append(f"vision_config is missing, and mm_vision_tower is {config.get('mm_vision_tower')!r}")
    if not isinstance(config.get("image_grid_pinpoints"), list):
        problems.append("image_grid_pinpoints is no list of [width, height]")
    if problems:
        raise ConversionError(f"{source} asks for what this model cannot do\n" + "\n".join(f"  {p}" for p in problems))
    stock = llava_next_config(ModelConfig(), 0, 0, "float32")["vision_config"]  # our defaults are this tower
    language = language_from_hf({**config, "model_type": "olmo"}, source)
    language.max_position_embeddings = config.get("tokenizer_model_max_length", language.max_position_embeddings)
    vision = vision_from_hf(
        {"model_type": "clip_vision_model", **(tower or stock)},
        f"{source}: vision_config",
        config.get("mm_vision_select_layer", -2),
    )
    index = config.get("image_token_index", image_token_index)
    pinpoints = [list(point) for point in config["image_grid_pinpoints"]]
    return ModelConfig(vision, language, index, pinpoints), aspect_ratio
