"""A model, its tokenizer and its image processor from a folder, for local scripts."""

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
"""Never quantized. Names from the root: transformers 5 would not find `vision_tower` alone, and quantize the tower."""


class LoadError(Exception):
    """A folder or a way of loading that does not work here; the message says what to do."""


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
        model_path: the folder, of any name, or a repository of the hub.
        model_base: not supported; a projector is joined to its towers by checkpoint_convert.
        model_name: not needed; config.json says what the folder holds.
        load_8bit, load_4bit: quantize the decoder's layers with bitsandbytes, on a GPU or a CPU (4 bits: nf4, twice
            quantized). Tower, projector, embedding and head stay as they are.
        device_map: "auto" is the GPU if there is one, otherwise the CPU; a device; or a map of modules to devices,
            which transformers hands to accelerate.
        attn_implementation: transformers' name of a kernel; by default its own choice. flash_attention_2 gives way to
            it with a warning where there is no flash-attn or no GPU.
        torch_dtype: of the weights; by default bfloat16 (float16 on GPUs that lack it), float32 on a CPU.
        **kwargs: for transformers' from_pretrained.

    Returns:
        tokenizer; model, whose `generate` gives the prompt back in front of the answer, as local scripts expect; image
        processor; the trained context, tokens.

    Raises:
        LoadError: no such model, a base model, or bitsandbytes is asked for and not installed.
    """
    if model_base is not None:
        raise LoadError(
            f"model_base ({model_base}) is not supported: {model_path} has to be a whole model. Join parts with "
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
    """That a local folder holds an `instellavl` model; a repository of the hub is left to transformers."""
    folder = Path(model_path)
    if not folder.is_dir():
        if folder.is_absolute() or model_path.startswith("."):
            raise LoadError(f"{model_path} is not there")
        return
    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{model_path} holds no config.json: is it the folder of an export?")
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if kind != InstellaVLConfig.model_type:
        raise LoadError(
            f"{model_path} holds a {kind} model, not an instellavl one: export with checkpoint_convert.megatron_to_hf "
            "--format instellavl, or load it with transformers"
        )


def _device(device_map: str | dict[str, Any]) -> torch.device:
    if isinstance(device_map, str) and device_map != "auto":
        return torch.device(device_map)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(device: torch.device, asked: torch.dtype | str | None) -> torch.dtype | str:
    if asked is not None:
        return asked
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _attention(asked: str | None, device: torch.device) -> str | None:
    if asked != "flash_attention_2" or (importlib.util.find_spec("flash_attn") and device.type == "cuda"):
        return asked
    why = "the model is on a CPU" if device.type == "cpu" else "the package flash-attn is not installed"
    warnings.warn(f"flash_attention_2 is asked for, but {why}: torch's own attention takes its place", stacklevel=3)
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
        # It says at every product of every layer that activations become float16 on their way to 8 bits.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=KEPT_WHOLE,
    )
