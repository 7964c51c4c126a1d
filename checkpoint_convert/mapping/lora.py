"""LoRA adapters of a checkpoint: merged into the weights, or under peft's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from checkpoint_convert.mapping.param_map import LANGUAGE, Entry
from checkpoint_convert.mapping.transforms import Copy
from megatron_vlm.config import LanguageConfig, TrainingConfig
from megatron_vlm.config.lora import lora_sizes
from megatron_vlm.config.training import LORA_MODULES

_MARK, _LAYERS = ".lora.", "language_model.decoder.layers."
_PEFT_PREFIX = "base_model.model.model.language_model."
"""peft's wrapper, and the language model inside transformers' LlavaNextForConditionalGeneration."""


@dataclass(frozen=True)
class AdapterNames:
    """One adapter: the Hugging Face tensor that it changes, and the names of its A and B in a checkpoint."""

    hf: str
    a: str
    b: str

    @property
    def peft(self) -> tuple[str, str]:
        """Names of A and B in adapter_model.safetensors."""
        return _weights_of(_PEFT_PREFIX + self.hf.removeprefix(LANGUAGE))

    @property
    def canonical(self) -> tuple[str, str]:
        """The same as hf_names.py translates them from any of peft's files."""
        return _weights_of(self.hf)


def _weights_of(weight: str) -> tuple[str, str]:
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of a language model, from outside."""

    training: TrainingConfig
    """Settings of a run that continues it."""
    entries: list[Entry]
    """Its part of the parameter map; the names of `tensors` are its Hugging Face names."""
    tensors: StoredTensors


def adapter_names(entries: list[Entry]) -> dict[str, AdapterNames]:
    """All adapters that a model can have, by the module's path in a language model: layers.0.self_attn.q_proj."""
    adapters = (_names(entry, hf) for entry in entries if _is_layer_weight(entry) for hf in entry.hf)
    by_path = {adapter.hf.removeprefix(LANGUAGE).removesuffix(".weight"): adapter for adapter in adapters}
    return {path: adapter for path, adapter in by_path.items() if path.rpartition(".")[2] in LORA_MODULES}


def _is_layer_weight(entry: Entry) -> bool:
    return entry.megatron.startswith(_LAYERS) and entry.megatron.endswith(".weight")


def _names(entry: Entry, hf: str) -> AdapterNames:
    prefix = entry.megatron.removesuffix(".weight") + _MARK + hf.split(".")[-2]
    return AdapterNames(hf, f"{prefix}.A", f"{prefix}.B")


def adapter_entries(entries: list[Entry], language: LanguageConfig, training: TrainingConfig) -> list[Entry]:
    """The parameter map of the adapters of `training`, from that of the model. A is [r, in] and B [out, r]."""
    sizes, found = lora_sizes(language), []
    for path, adapter in adapter_names(entries).items():
        module = path.rpartition(".")[2]
        if module not in training.lora_target_modules:
            continue
        inputs, outputs = sizes[module]
        shapes = ((training.lora_r, inputs), (outputs, training.lora_r))
        for megatron, hf, shape in zip((adapter.a, adapter.b), adapter.canonical, shapes, strict=True):
            found.append(Entry(megatron, (hf,), Copy(), (shape,)))
    return found


def adapters_of(entry: Entry, stored: StoredTensors) -> list[AdapterNames | None]:
    """Of each Hugging Face tensor of an entry, the adapter that `stored` has for it."""
    if not _is_layer_weight(entry):
        return [None] * len(entry.hf)
    return [names if names.a in stored else None for names in (_names(entry, hf) for hf in entry.hf)]


def peft_tensors(entries: list[Entry], stored: StoredTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in peft's file, tensor) of all adapters."""
    for adapter in adapter_names(entries).values():
        if adapter.a in stored:
            yield from zip(adapter.peft, (stored[adapter.a], stored[adapter.b]), strict=True)


class WithoutAdapters(StoredTensors):
    """A checkpoint's tensors without its adapters."""

    _entries: dict[str, Entry | None]
    """Name -> its entry in the parameter map; None: it has none."""

    def __init__(self, entries: list[Entry], stored: StoredTensors) -> None:
        by_name = {entry.megatron: entry for entry in entries}
        self._entries = {name: by_name.get(name) for name in stored if _MARK not in name}
        self._stored = stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name]


class MergedTensors(WithoutAdapters):
    """A checkpoint's tensors with its adapters added: W + scaling * B A, computed in fp32."""

    def __init__(self, entries: list[Entry], stored: StoredTensors, scaling: float) -> None:
        super().__init__(entries, stored)
        self._scaling = scaling

    def __getitem__(self, name: str) -> torch.Tensor:
        entry, weight = self._entries[name], self._stored[name]
        if entry is None:
            return weight
        adapters = adapters_of(entry, self._stored)
        if not any(adapters):
            return weight
        changes = [
            torch.zeros(shape) if names is None else self._stored[names.b].float() @ self._stored[names.a].float()
            for names, shape in zip(adapters, entry.hf_shapes, strict=True)
        ]
        merged = weight.float() + self._scaling * entry.transform.to_megatron(changes)
        return merged.to(weight.dtype)
