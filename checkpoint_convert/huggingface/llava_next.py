"""The files beside the weights that stock transformers, vLLM and SGLang need to load a `llava_next` folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert.huggingface.config import llava_next_config
from checkpoint_convert.huggingface.tokenizer import IMAGE_TOKEN, export_tokenizer
from checkpoint_convert.mapping.families import TOWERS
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.chat_template import FILE as CHAT_TEMPLATE_FILE
from megatron_vlm.data.processing.chat_template import INSTELLA
from megatron_vlm.data.processing.tokenizer import Tokenizer

PIL_BICUBIC = 3


def write_configs(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write everything but the weights into `folder`: configs, processors, chat template and tokenizer."""
    export_tokenizer(tokenizer, model, folder)
    name = str(dtype).removeprefix("torch.")
    _write(folder, "config.json", llava_next_config(model, tokenizer.eos_id, tokenizer.pad_id, name))
    _write(folder, "generation_config.json", {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id})
    _write(folder, "preprocessor_config.json", _image_processor(model))
    _write(folder, "processor_config.json", _processor(model))
    template = tokenizer.chat_template
    (folder / CHAT_TEMPLATE_FILE).write_text(template.text if template else INSTELLA, encoding="utf-8")


def _image_processor(model: ModelConfig) -> dict[str, Any]:
    side = model.vision.image_size
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": PIL_BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
        "do_pad": True,
        "image_grid_pinpoints": [[height, width] for width, height in model.image_grid_pinpoints],
    }


def _processor(model: ModelConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaNextProcessor",
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": TOWERS[model.vision.model_type].select_strategy,
        "image_token": IMAGE_TOKEN,
        # the class token, which the strategy above drops
        "num_additional_image_tokens": int(model.vision.class_token),
    }


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
