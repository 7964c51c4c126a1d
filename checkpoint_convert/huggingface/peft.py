"""A LoRA adapter in the two files that peft writes and loads. peft itself is not needed."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.safetensors import FolderTensors
from checkpoint_convert.mapping.lora import Adapter, adapter_entries
from checkpoint_convert.mapping.param_map import LANGUAGE, Entry, param_map
from megatron_vlm.config import ModelConfig, TrainingConfig
from megatron_vlm.config.lora import LANGUAGE_LORA
from megatron_vlm.config.training import LORA_MODULES, LoraModule

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")

_MERGE = "Add the adapter to its base model with peft's merge_and_unload, save that, and import it without --adapter"
_OTHER_COMPUTATIONS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
"""Settings that make an adapter more than one B A per layer, of one rank and alpha for all layers."""
_INITS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base model's weights, too; some have a number of iterations behind."""
_NAME = re.compile(rf"{re.escape(LANGUAGE)}layers\.(\d+)\.\w+\.({'|'.join(LORA_MODULES)})\.lora_[AB]\.weight")


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


def read_adapter(folder: Path, model: ModelConfig, base: str) -> Adapter:
    """A LoRA adapter that peft saved, of a whole VLM or of its language model alone.

    Args:
        folder: has adapter_config.json, and adapter_model.safetensors or .bin.
        model: the model that it is for.
        base: name of the model in errors.

    Raises:
        ConversionError: a file is missing or damaged, the adapter computes something that a run here does not, or it
            is not one of this model.
    """
    config = _read_config(folder)
    file = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ConversionError(f"{folder} holds no weights: {' or '.join(_WEIGHT_FILES)} is missing. Copy it again")
    tensors = FolderTensors(file, "peft")
    modules = _modules_of(tensors, file, config)
    rank, alpha = config["r"], float(config["lora_alpha"])
    if config.get("use_rslora"):  # alpha / sqrt(r) in place of alpha / r
        alpha *= math.sqrt(rank)
    training = TrainingConfig(
        trainable=["projector", LANGUAGE_LORA], lora_r=rank, lora_alpha=alpha, lora_target_modules=modules
    )
    entries = adapter_entries(param_map(model), model.language, training)
    _check_layers(tensors, file, model.language.num_hidden_layers, base)
    _check_tensors(tensors, file, entries, rank, base)
    if config.get("lora_dropout"):
        print(f"note: {folder} was trained with lora_dropout, which does not exist here", file=sys.stderr)
    return Adapter(training, entries, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, after checking that our adapters compute the same."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConversionError(f"{folder} is no adapter of peft: it has no {CONFIG}. Give the folder that peft wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}): copy the adapter again") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no settings: copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is {config.get('peft_type')!r}; supported: 'LORA'. {_MERGE}")
    for name, kind, plural in (("r", int, "a whole number"), ("lora_alpha", int | float, "a number")):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise ConversionError(f"{path}: {name} is {value!r}; expected {plural} above 0. Copy the adapter again")
    init = str(config.get("init_lora_weights")).lower()
    wrong = [name for name in _OTHER_COMPUTATIONS if config.get(name)]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if init.startswith(_INITS_OF_THE_BASE) else []
    if wrong:
        settings = ", ".join(f"{name} = {config[name]!r}" for name in wrong)
        raise ConversionError(f"{path}: {settings}: such adapters cannot be trained here. {_MERGE}")
    return config


def _modules_of(tensors: FolderTensors, file: Path, config: dict[str, Any]) -> list[LoraModule]:
    """The modules that have adapters, by the file's tensors; others than the language model's are an error."""
    foreign = [name for name in tensors if not _NAME.fullmatch(name)]
    if foreign:
        raise ConversionError(
            f"{file} has adapters outside the language model's linear layers, which cannot be trained here: "
            f"{_few(foreign)}. {_MERGE}"
        )
    if not len(tensors):
        raise ConversionError(f"{file} holds no tensors. Save the adapter again")
    found = {match[2] for match in map(_NAME.fullmatch, tensors) if match}
    targets = config.get("target_modules")
    if isinstance(targets, list) and not config.get("exclude_modules"):
        absent = [str(target) for target in targets if str(target).rpartition(".")[2] not in found]
        if absent:
            raise ConversionError(
                f"{file} lacks the adapters of {_few(absent)}, which target_modules of {CONFIG} names. Save the "
                "adapter again"
            )
    return [module for module in LORA_MODULES if module in found]


def _check_layers(tensors: FolderTensors, file: Path, layers: int, base: str) -> None:
    """Raise ConversionError if the adapter's last layer is not the model's last layer."""
    theirs = 1 + max(int(match[1]) for match in map(_NAME.fullmatch, tensors) if match)
    if theirs != layers:
        raise ConversionError(
            f"{file} is an adapter of {theirs} layers, and {base} has {layers}. Give the base model that it was "
            "trained on"
        )


def _check_tensors(tensors: FolderTensors, file: Path, entries: list[Entry], rank: int, base: str) -> None:
    """Raise ConversionError if a tensor is missing or of another shape than rank and model give it."""
    shapes = {entry.hf[0]: entry.hf_shapes[0] for entry in entries}
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ConversionError(f"{file} lacks tensors: {_few(missing)}. Save the adapter again, or copy it again")
    for name, shape in shapes.items():
        found = tensors.shape(name)
        if found == shape:
            continue
        side = 0 if ".lora_A." in name else -1
        if len(found) == len(shape) and found[side] != rank:
            raise ConversionError(
                f"{file}: {_short(name)} has rank {found[side]}, and {CONFIG} says r = {rank}. Copy both files again"
            )
        raise ConversionError(
            f"{file}: {_short(name)} is {found}, and {base} needs {shape}. Give the base model that the adapter was "
            "trained on"
        )


def _few(names: list[str]) -> str:
    """The first names of a list, in one line."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(_short, names[:3])) + more


def _short(name: str) -> str:
    """A tensor's name without what all have in common."""
    return name.removeprefix(LANGUAGE).removesuffix(".weight")
