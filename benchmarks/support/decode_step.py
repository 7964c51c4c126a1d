"""The time of a decode step, and how much of the memory's rate it reaches: decode is limited by reading.

A step reads the language model's weights once, and the cached keys and values of every request.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.request import SamplingParams, TokenPrompt
from megatron_vlm.inference.sizes import block_bytes
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.openmp import release_threads

STEPS = 48
"""Decode steps that are timed together."""
_READ_BYTES = 2**30


@dataclass
class DecodeStep:
    """What was measured while a number of requests were in decode, and nothing else ran."""

    requests: int
    context: int
    """Cached tokens of each request, on average."""
    seconds: float
    bytes_read: int
    memory_bytes_per_second: float
    """At which a sum reads memory, right before and after."""

    def __str__(self) -> str:
        read, limit = self.bytes_read / self.seconds / 1e9, self.memory_bytes_per_second / 1e9
        return (
            f"{self.requests} requests in decode, {self.context} tokens each: a step takes "
            f"{1000 * self.seconds:.1f} ms and reads {self.bytes_read / 1e9:.2f} GB. That is {read:.1f} GB/s, "
            f"{read / limit:.0%} of what a sum reads ({limit:.1f} GB/s)."
        )


def measure(engine: Engine, prompts: list[list[int]]) -> DecodeStep:
    """Let an engine without other requests decode prompts of one length at the same time."""
    before = _memory_rate()
    num_requests, length = len(prompts), len(prompts[0])
    budget = engine.config.inference_dynamic_batching_max_tokens - num_requests
    # The first request generates tokens while the others' prompts are computed, and must be there until the end.
    prefill_steps = -(-num_requests * length // max(1, budget)) + num_requests
    params = SamplingParams(prefill_steps + STEPS + 1, ignore_eos=True)
    handles = [engine.submit(TokenPrompt(tokens), params) for tokens in prompts]
    last = handles[-1]
    last.next_output()
    generated = engine.stats().generated_tokens
    started = time.perf_counter()
    for _ in range(STEPS):
        last.next_output()
    seconds = (time.perf_counter() - started) / STEPS
    assert engine.stats().running == num_requests
    for handle in handles:
        handle.cancel()
        for _ in handle:
            pass
    context = length + generated // num_requests + STEPS // 2
    weights = sum(p.numel() * p.element_size() for p in engine.model.language_model.parameters())
    cache = num_requests * context * block_bytes([engine.model], 1)
    return DecodeStep(num_requests, context, seconds, weights + cache, (before + _memory_rate()) / 2)


def _memory_rate() -> float:
    """Bytes per second that a sum reads of a tensor which is larger than caches."""
    tensor = torch.ones(_READ_BYTES // 4, device=current_device())
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        tensor.sum()
        if on_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    release_threads()  # for the engine's thread
    return _READ_BYTES / statistics.median(seconds[1:])
