"""Sizes of the engine that depend on the machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.config import ConfigError, InferenceConfig, Recipe
from megatron_vlm.inference import ranks, sizes
from megatron_vlm.runtime import device

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 GiB, of which 7 are free, and 1 more that torch has reserved and not allocated."""
    monkeypatch.setattr(sizes, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "device_memory", lambda: 10 * GIB)
    monkeypatch.setattr(device.torch.cuda, "mem_get_info", lambda: (7 * GIB, 10 * GIB))
    monkeypatch.setattr(device.torch.cuda, "memory_reserved", lambda: 3 * GIB)
    monkeypatch.setattr(device.torch.cuda, "memory_allocated", lambda: 2 * GIB)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes.cache_bytes(InferenceConfig()) == int(0.8 * 8 * GIB)
    assert sizes.cache_bytes(InferenceConfig(inference_dynamic_batching_buffer_size_gb=0.5)) == GIB // 2
    assert sizes.tokens_per_step(InferenceConfig()) == 2048
    monkeypatch.setattr(device, "device_memory", lambda: 5 * GIB)  # this process may have no more
    assert sizes.cache_bytes(InferenceConfig()) == int(0.8 * 3 * GIB)


def test_on_a_cpu() -> None:
    assert sizes.cache_bytes(InferenceConfig()) == 2 * GIB
    assert sizes.tokens_per_step(InferenceConfig()) == 512
    assert sizes.tokens_per_step(InferenceConfig(inference_max_requests=700)) == 700
    assert sizes.tokens_per_step(InferenceConfig(inference_dynamic_batching_max_tokens=40)) == 40


def test_no_more_blocks_than_requests_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "block_bytes", lambda *_: 1000)
    chunks: Any = [SimpleNamespace(recipe=Recipe())]
    config = InferenceConfig(inference_max_requests=2, inference_max_seq_length=100)
    assert sizes.num_blocks(chunks, config) == 2 * 2 * 2 + 1  # a sequence has 2 blocks of 64
    config.inference_dynamic_batching_buffer_size_gb = 3500 / GIB
    assert sizes.num_blocks(chunks, config) == 3


def test_a_full_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "block_bytes", lambda *_: GIB)
    monkeypatch.setattr(sizes, "free_device_memory", lambda: GIB)
    chunks: Any = [SimpleNamespace(recipe=Recipe())]
    channel: Any = SimpleNamespace(minimum=lambda value: value)
    with pytest.raises(ConfigError, match=r"buffer_size_gb = 0.0: 0.8 GiB on this rank are too small for two blocks"):
        ranks.prepare_rank(chunks, InferenceConfig(), channel)
