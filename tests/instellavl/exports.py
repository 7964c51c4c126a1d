"""One random model as two exports, `instellavl` and `llava_next`, and images for questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert.huggingface import instellavl, llava_next
from checkpoint_convert.huggingface.safetensors import write_weights
from checkpoint_convert.mapping.hf_names import instellavl_name
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from tests.checkpoint_convert.whole_model import canonical_tensors, model_config, picture
from tests.support.random_models import GROUPED_QUERY_SIZES, llava_next_model

SIZES = {"single": (20, 20), "tall": (25, 80), "wide": (90, 31), "larger than any grid": (400, 201)}
"""(width, height)"""
NEWLINE = 200
SEED, NEWLINE_FACTOR = 23, 3.5
"""With these values most answers have several lines, and all differ."""
ENDING = {"exponential_decay_length_penalty": [40, 1.5]}
"""For generation_config.json: answers of a random model seldom end; with this they end after 40 tokens."""


def write_exports(root: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> ModelConfig:
    """Write root/instellavl, root/llava_next and root/tokenizer, for a model with an untied output weight."""
    vocab_size = write_tokenizer(root / "tokenizer")
    settings = {"language": GROUPED_QUERY_SIZES, "seed": SEED, **settings}
    reference = llava_next_model(image_token_index=vocab_size, **settings)
    with torch.no_grad():
        reference.lm_head.weight[NEWLINE] *= NEWLINE_FACTOR
    model, tokenizer = model_config(reference), load_tokenizer(root / "tokenizer")
    tensors = {name: tensor.to(dtype) for name, tensor in canonical_tensors(reference).items()}
    for name in ("instellavl", "llava_next"):
        (root / name).mkdir()
    instellavl.write_configs(root / "instellavl", model, tokenizer, dtype, "anyres")
    write_weights(((instellavl_name(name), tensor) for name, tensor in tensors.items()), root / "instellavl")
    llava_next.write_configs(root / "llava_next", model, tokenizer, dtype)
    write_weights(tensors.items(), root / "llava_next")
    make_answers_end(root)
    return model


def make_answers_end(root: Path) -> None:
    """Change the generation config of both exports."""
    for file in root.glob("*/generation_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | ENDING))


def pictures() -> dict[str, Image.Image]:
    """An image of each shape."""
    return {name: picture(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
