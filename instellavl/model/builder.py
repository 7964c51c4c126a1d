"""Loads a model, its tokenizer and its image processor from a folder, for local scripts."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from instellavl.configuration_instellavl import InstellaVLConfig
from instellavl.image_processing_instellavl import InstellaVLImageProcessor
from instellavl.modeling_instellavl import InstellaVLForCausalLM

KEPT_WHOLE = ["model.vision_tower", "model.mm_projector", "lm_head"]
"""Modules that are never quantized. transformers 5 needs the full name: with `vision_tower` it quantizes the tower."""


class LoadError(Exception):
    """A folder cannot be loaded, or an option is not supported; the message says what to do."""


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] = "auto",
    attn_implementation: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> tuple[Any, InstellaVLForCausalLM, InstellaVLImageProcessor, int]:
    """Load an `instellavl` folder.

    Args:
        model_path: a folder, or a repository of the hub.
        model_base: not supported; checkpoint_convert joins a projector with a tower and a language model.
        model_name: not used; config.json has the type of the model.
        load_8bit, load_4bit: quantize the decoder's layers with bitsandbytes, on a GPU or a CPU (4 bits: nf4 with
            double quantization). Tower, projector, embedding and head are not quantized.
        device_map: "auto" for the GPU if there is one, otherwise the CPU; a device; or a map of modules to devices,
            which transformers passes to accelerate.
        attn_implementation: transformers' name of a kernel; by default transformers chooses. Without flash-attn or a
            GPU, flash_attention_2 is replaced by the default with a warning.
        torch_dtype: dtype of the weights; by default bfloat16 (float16 on GPUs without it), float32 on a CPU.
        **kwargs: for transformers' from_pretrained.

    Returns:
        tokenizer; model, whose `generate` returns the prompt before the answer, as local scripts expect; image
        processor; tokens of the trained context.

    Raises:
        LoadError: there is no such model, model_base is given, or bitsandbytes is not installed.
    """
    if model_base is not None:
        raise LoadError(
            f"model_base ({model_base}) is not supported: {model_path} must be a whole model. Join parts with "
            "checkpoint_convert.hf_to_megatron and export the result"
        )
    _check_config(model_path)
    device = _device(device_map)
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = _quantization(load_8bit, load_4bit, _dtype(device, torch_dtype))
        kwargs["device_map"] = device_map if isinstance(device_map, dict) else {"": device}
    elif isinstance(device_map, dict):
        kwargs["device_map"] = device_map
    kwargs["dtype"] = _dtype(device, torch_dtype)
    kwargs["attn_implementation"] = _attention(attn_implementation, device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    model = InstellaVLForCausalLM.from_pretrained(model_path, **kwargs)
    if "device_map" not in kwargs:
        model = model.to(device)
    model.returns_prompt = True
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, model.config.tokenizer_model_max_length


def _check_config(model_path: str) -> None:
    """Raise LoadError if a local folder holds no `instellavl` model; transformers checks those of the hub."""
    folder = Path(model_path)
    if not folder.is_dir():
        if folder.is_absolute() or model_path.startswith("."):
            raise LoadError(f"{model_path} does not exist")
        return
    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{model_path} holds no config.json: is it the folder of an export?")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != InstellaVLConfig.model_type:
        raise LoadError(
            f"{model_path} holds a {model_type} model, not an instellavl one: export with "
            "checkpoint_convert.megatron_to_hf --format instellavl, or load it with transformers"
        )


def _device(device_map: str | dict[str, Any]) -> torch.device:
    if isinstance(device_map, str) and device_map != "auto":
        return torch.device(device_map)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(device: torch.device, requested: torch.dtype | str | None) -> torch.dtype | str:
    if requested is not None:
        return requested
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _attention(requested: str | None, device: torch.device) -> str | None:
    if requested != "flash_attention_2" or (importlib.util.find_spec("flash_attn") and device.type == "cuda"):
        return requested
    why = "the model is on a CPU" if device.type == "cpu" else "the package flash-attn is not installed"
    warnings.warn(f"flash_attention_2 is asked for, but {why}: using torch's own attention", stacklevel=3)
    return None


def _quantization(load_8bit: bool, load_4bit: bool, compute_dtype: torch.dtype | str) -> Any:
    if load_8bit and load_4bit:
        raise LoadError("load_8bit and load_4bit: choose one")
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise LoadError(
            f"load_{8 if load_8bit else 4}bit needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    from transformers import BitsAndBytesConfig

    if load_8bit:
        # It warns in every layer that activations are converted to float16 before quantization.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=KEPT_WHOLE,
    )
