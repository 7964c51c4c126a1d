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
from megatron_vlm.data.processing.tokenizer import Tokenizer

PIL_BICUBIC = 3

# The `instella` template of megatron_vlm/data/processing/conversation.py in Jinja. A message's content is text with
# <image> for each image, or a list of parts, of which the images come first, as in training.
CHAT_TEMPLATE = (
    "{{ eos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('roles are user, assistant and system, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ text.strip() + eos_token + '\\n' }}"
    "{% else %}{{ text + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def write_configs(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write everything but the weights into `folder`: configs, processors, chat template and tokenizer."""
    export_tokenizer(tokenizer, model, folder)
    name = str(dtype).removeprefix("torch.")
    _write(folder, "config.json", llava_next_config(model, tokenizer.eos_id, tokenizer.pad_id, name))
    _write(folder, "generation_config.json", {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id})
    _write(folder, "preprocessor_config.json", _image_processor(model))
    _write(folder, "processor_config.json", _processor(model))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


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
