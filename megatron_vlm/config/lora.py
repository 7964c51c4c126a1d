"""LoRA (arXiv:2106.09685) on the language model: which linear layers get an adapter, and of which sizes.

An adapter adds (alpha / r) B A x to a layer y = W x, whose W is frozen; A is [r, in] and B [out, r]. Layers have
transformers' names, as in peft. megatron-core computes several of them as one: each still has an adapter of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from megatron_vlm.config.model import LanguageConfig
from megatron_vlm.config.training import LoraModule, TrainingConfig

FUSED_LAYERS: Mapping[str, tuple[LoraModule, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""megatron-core's linear layers, and what each consists of, in the order of its output."""
ROW_PARALLEL: tuple[LoraModule, ...] = ("o_proj", "down_proj")
"""Whose input is split over tensor ranks; that of the others is their output."""
LANGUAGE_LORA: Literal["language_lora"] = "language_lora"
"""The choice of training.trainable that gives the language model adapters."""


def uses_lora(training: TrainingConfig) -> bool:
    """Whether the language model has adapters."""
    return LANGUAGE_LORA in training.trainable


def is_trained(training: TrainingConfig, part: str) -> bool:
    """Whether anything in a model part is trained, be it adapters alone."""
    return part in training.trainable or (part == "language" and uses_lora(training))


def lora_sizes(language: LanguageConfig) -> dict[LoraModule, tuple[int, int]]:
    """(in, out) of each linear layer."""
    hidden, inner = language.hidden_size, language.intermediate_size
    queries = language.num_attention_heads * language.head_width
    keys = language.num_key_value_heads * language.head_width
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def lora_parameters(language: LanguageConfig, training: TrainingConfig) -> int:
    """Parameters of all adapters; 0 without LoRA."""
    if not uses_lora(training):
        return 0
    sizes = lora_sizes(language)
    modules = set(training.lora_target_modules)
    return language.num_hidden_layers * training.lora_r * sum(sum(sizes[module]) for module in modules)


def lora_settings(training: TrainingConfig) -> dict[str, object] | None:
    """What two runs must share for the adapters of one to mean the same in the other; None without LoRA."""
    if not uses_lora(training):
        return None
    return {
        "lora_r": training.lora_r,
        "lora_alpha": training.lora_alpha,
        "lora_target_modules": sorted(set(training.lora_target_modules)),
    }
