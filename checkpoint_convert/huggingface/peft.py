"""A LoRA adapter in the two files that peft loads onto a `llava_next` model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_vlm.config import TrainingConfig
from megatron_vlm.config.training import LORA_MODULES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(
    folder: Path, training: TrainingConfig, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: exists.
        training: settings of the run, with LoRA.
        tensors: under peft's names.
        dtype: of the weights that are written.
    """
    (folder / CONFIG).write_text(json.dumps(adapter_config(training), indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in tensors}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def adapter_config(training: TrainingConfig) -> dict[str, Any]:
    """peft's LoraConfig. The modules are a pattern, because the vision tower has some of the same names."""
    modules = [module for module in LORA_MODULES if module in training.lora_target_modules]
    alpha = training.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": training.lora_r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*language_model.*\.({'|'.join(modules)})",
        "inference_mode": True,
    }
