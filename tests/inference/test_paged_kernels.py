"""The cache that GPUs use: one kernel call for all requests of a step, and decode steps as recorded graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vlm.config import ConfigError, InferenceConfig
from megatron_vlm.inference import model_runner
from megatron_vlm.inference.batched_kv_cache import BatchedKVCache
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.kv_cache import PagedKVCache
from megatron_vlm.inference.load import load_engine
from megatron_vlm.inference.paged_kernels import PagedKernel, copying
from megatron_vlm.inference.request import SamplingParams
from megatron_vlm.model.layers.packed_sequence import PackedSequence
from tests.inference.paged_plans import plan_of, random_plans
from tests.inference.paged_reference import PAGED, RecordedOperations, packed_attention
from tests.inference.tiny_model import random_specs, write_tiny_model

CPU, BLOCK = torch.device("cpu"), 4


COPYING = PagedKernel(copying(packed_attention), reads_blocks=False)


STEPS = [
    plan_of(16, (6, 0, [3, 1]), (7, 0, [7, 5])),  # two prompts, whose blocks are in any order
    plan_of(8, (1, 6, [3, 1]), (1, 7, [7, 5])),  # decode
    plan_of(16, (1, 7, [3, 1]), (1, 8, [7, 5, 2]), (9, 0, [4, 6, 9])),  # a third joins
    plan_of(8, (1, 8, [3, 1, 8]), (4, 9, [4, 6, 9, 10])),  # the second has left; a chunk with cached tokens
    plan_of(1, (1, 9, [3, 1, 8])),  # alone, without padding
    plan_of(8, (1, 13, [4, 6, 9, 10]), (3, 8, [4, 6, 11])),  # blocks that two requests share
]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", [PAGED, COPYING], ids=["written out", "copying"])
def test_all_requests_at_once_or_one_by_one(kernel: PagedKernel, kv_heads: int) -> None:
    """Both caches, through the same steps, in two layers."""
    one_by_one, at_once = PagedKVCache(64, BLOCK), BatchedKVCache(64, BLOCK, kernel)
    generator = torch.Generator().manual_seed(0)
    packed = PackedSequence(qkv_format="thd")
    for plan in [*STEPS, *random_plans(BLOCK)]:
        used = sum(span.length for span in plan.spans)
        for cache in (one_by_one, at_once):
            cache.start_step(plan, CPU, torch.float32)
        for layer in (1, 2):
            query, key, value = (
                torch.randn(len(plan.tokens), heads, 8, generator=generator) for heads in (4, kv_heads, kv_heads)
            )
            expected = one_by_one.attend(layer, query, key, value, packed)
            actual = at_once.attend(layer, query, key, value, packed)
            torch.testing.assert_close(actual[:used], expected[:used])
            assert actual.isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paged")
    write_tiny_model(folder)
    return folder / "megatron"


CONFIG = InferenceConfig(
    inference_max_requests=12,
    inference_max_seq_length=400,
    inference_dynamic_batching_max_tokens=48,
    inference_dynamic_batching_block_size=8,
    max_cached_images=2,
)


@contextmanager
def _engine(folder: Path, config: InferenceConfig, kernel: PagedKernel | None) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "paged_kernel", lambda *_: kernel)
        with load_engine(folder, config) as engine:
            assert engine is not None
            yield engine


def _answers(engine: Engine) -> list[tuple[list[int | None], list[float | None]]]:
    """Of random prompts with images and without, which join and leave the batch at different steps."""
    handles = [
        engine.submit(spec.prompt(), SamplingParams(4 + spec.seed, logprobs=0, ignore_eos=True, seed=spec.seed,
                                                    temperature=0.7 * (spec.seed % 2)))
        for spec in random_specs(15, 60)
    ]  # fmt: skip
    outputs = [list(handle) for handle in handles]
    return [([o.token_id for o in answer], [o.logprob for o in answer]) for answer in outputs]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[list[int | None], list[float | None]]]:
    with _engine(folder, CONFIG, None) as engine:
        return _answers(engine)


@pytest.mark.parametrize(("kernel", "graphs"), [(COPYING, "none"), (PAGED, "none"), (PAGED, "local")])
def test_an_engine_gives_the_same_answers(
    folder: Path,
    expected: list[tuple[list[int | None], list[float | None]]],
    kernel: PagedKernel,
    graphs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunked prefill, shared prefixes and images, sampled and greedy; and decode from what was recorded."""
    record = RecordedOperations()
    monkeypatch.setattr(model_runner, "CudaGraphs", lambda: record)
    config = replace(CONFIG, cuda_graph_impl=graphs)  # type: ignore[arg-type]
    with _engine(folder, config, kernel) as engine:
        engine.generate([random_specs(1, 9)[0].prompt()], 12)  # alone
        for _ in range(2):  # the second time with cached prefixes
            answers = _answers(engine)
            for (tokens, logprobs), (their_tokens, their_logprobs) in zip(answers, expected, strict=True):
                assert tokens == their_tokens
                assert logprobs == pytest.approx(their_logprobs, rel=0, abs=1e-5)
    # At least rows of one token. Which others depends on how many requests were in decode at the same time.
    assert record.count >= 1 if graphs == "local" else record.count == 0


def test_graphs_that_cannot_be_used(folder: Path) -> None:
    config = replace(CONFIG, cuda_graph_impl="local")
    for kernel in (None, COPYING):
        with pytest.raises(ConfigError, match="cuda_graph_impl = local: needs a GPU"), _engine(folder, config, kernel):
            pass
    unknown = replace(CONFIG, cuda_graph_impl="full")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="= full: must be none or local"), _engine(folder, unknown, PAGED):
        pass
