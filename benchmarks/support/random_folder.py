"""Write a `llava_next` folder of any size with random weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint_convert.huggingface.llava_next import write_configs
from checkpoint_convert.huggingface.safetensors import TensorSpec, write_weights
from checkpoint_convert.mapping.param_map import hf_shapes, param_map
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.tokenizer import load_tokenizer


def write_random_folder(folder: Path, tokenizer: Path, model: ModelConfig, dtype: torch.dtype) -> int:
    """Sample weights from N(0, 0.05) and norm weights from 1 + N(0, 0.2).

    Zero biases or unit norms would hide a dropped bias or swapped norms. Returns the number of parameters, unused
    vision layers included.
    """
    folder.mkdir(parents=True)
    write_configs(folder, model, load_tokenizer(tokenizer), dtype)
    plan = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(param_map(model)).items()]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for tensor in plan:
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm_weight = "norm" in tensor.name and tensor.name.endswith("weight")
            yield tensor.name, 1 + 0.2 * noise if is_norm_weight else 0.05 * noise

    write_weights(tensors(), folder, plan=plan)
    return sum(tensor.nbytes for tensor in plan) // dtype.itemsize
