"""A conversion reads each tensor once, and none to find out what there is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from checkpoint_convert.mapping.lazy_tensors import ChosenTensors, JoinedTensors, StoredTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, MegatronTensors, name_map
from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig


class CountedTensors(StoredTensors):
    """Random tensors; counts how often each is read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._places = shapes
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return torch.randn(self._places[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name]

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
    entries = name_map(model)
    source = CountedTensors({n: s for e in entries for n, s in zip(e.hf, e.hf_shapes, strict=True)})
    half = JoinedTensors(ChosenTensors(source, ("vision_tower.",)), ChosenTensors(source, ("language", "multi", "im")))
    made = MegatronTensors(entries, half, "the source")
    assert len(half) == len(source) > 0
    assert all(entry.megatron in made for entry in entries)
    assert "nothing" not in made
    assert not source.reads, "asked for names and shapes alone"
    for name, tensor in made.items():
        assert made[name] is tensor, "kept, for the parts that are asked for next"
    assert source.reads == Counter(list(source))


def test_each_tensor_is_read_once_on_the_way_to_hugging_face(model: ModelConfig) -> None:
    entries = name_map(model)
    megatron = MegatronTensors(
        entries, {n: torch.empty(s) for e in entries for n, s in zip(e.hf, e.hf_shapes, strict=True)}, "no file"
    )
    source = CountedTensors({name: tuple(tensor.shape) for name, tensor in megatron.items()})
    made = HuggingFaceTensors(entries, source, "the source")
    assert not source.reads
    assert sum(tensor.numel() for _, tensor in made.items()) > 0
    assert source.reads == Counter(list(source))
