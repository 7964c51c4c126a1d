"""A conversion reads each tensor once, and none to list names and shapes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from checkpoint_convert.mapping.lazy_tensors import JoinedTensors, SelectedTensors, StoredTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, MegatronTensors, hf_shapes, param_map
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig


class CountedTensors(StoredTensors):
    """Random tensors; counts how often each is read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._entries = shapes
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return torch.randn(self._entries[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


@pytest.fixture
def model() -> ModelConfig:
    vision = VisionConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
    language = LanguageConfig(
        hidden_size=12, intermediate_size=6, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3
    )
    return ModelConfig(vision, language)


def test_each_tensor_is_read_once_on_the_way_to_megatron(model: ModelConfig) -> None:
    entries = param_map(model)
    source = CountedTensors(hf_shapes(entries))
    joined = JoinedTensors(
        SelectedTensors(source, ("vision_tower.",)), SelectedTensors(source, ("language", "multi", "im"))
    )
    converted = MegatronTensors(entries, joined, "the source")
    assert len(joined) == len(source) > 0
    assert all(entry.megatron in converted for entry in entries)
    assert "nothing" not in converted
    assert not source.reads, "names and shapes are known without reading"
    for name, tensor in converted.items():
        assert converted[name] is tensor, "the last tensor is kept"
    assert source.reads == Counter(list(source))


def test_each_tensor_is_read_once_on_the_way_to_hugging_face(model: ModelConfig) -> None:
    entries = param_map(model)
    tensors = {name: torch.empty(shape) for name, shape in hf_shapes(entries).items()}
    megatron = MegatronTensors(entries, tensors, "no file")
    source = CountedTensors({name: tuple(tensor.shape) for name, tensor in megatron.items()})
    converted = HuggingFaceTensors(entries, source, "the source")
    assert not source.reads
    assert sum(tensor.numel() for _, tensor in converted.items()) > 0
    assert source.reads == Counter(list(source))
