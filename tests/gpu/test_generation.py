"""Generation on a GPU: attention of all requests at once, and CUDA graphs of decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_kernels import BF16
from tests.support.launch import launch

pytestmark = pytest.mark.gpu
CLOSE = 0.05
"""Of log-probabilities in bf16: within it, either of two tokens may be the most likely one."""


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 128), (12, 4, 64)])
def test_every_backend_of_this_machine(heads: int, kv_heads: int, width: int, block_size: int) -> None:
    """Against requests that are attended one by one in fp32: prefill, chunks with cached tokens, decode."""
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.config import Recipe
    from megatron_vlm.inference.batched_kv_cache import BatchedKVCache
    from megatron_vlm.inference.kv_cache import PagedKVCache
    from megatron_vlm.inference.paged_kernels import paged_kernel
    from megatron_vlm.model.layers.attention_backend import PREFERRED, why_not
    from megatron_vlm.model.layers.packed_sequence import PackedSequence
    from megatron_vlm.runtime.device import device_kind
    from tests.inference.paged_plans import random_plans

    recipe = Recipe()
    recipe.training.bf16 = True
    recipe.model.language.head_dim = width
    device, packed = torch.device("cuda"), PackedSequence(qkv_format="thd")
    tested = []
    for backend in PREFERRED[device_kind()]:
        if why_not(backend, torch.bfloat16, width) is not None:
            continue
        recipe.training.attention_backend = backend
        kernel = paged_kernel(recipe, block_size)
        if kernel is None:
            continue
        tested.append(backend)
        at_once, one_by_one = BatchedKVCache(64, block_size, kernel), PagedKVCache(64, block_size)
        generator = torch.Generator("cuda").manual_seed(0)
        for plan in random_plans(block_size):
            used = sum(span.length for span in plan.spans)
            half = [
                torch.randn(len(plan.tokens), count, width, device=device, generator=generator).bfloat16()
                for count in (heads, kv_heads, kv_heads)
            ]
            at_once.start_step(plan, device, torch.bfloat16)
            one_by_one.start_step(plan, device, torch.float32)
            actual = at_once.attend(1, *half, packed)[:used].float()
            expected = one_by_one.attend(1, *(x.float() for x in half), packed)[:used]
            assert float((actual - expected).norm() / expected.norm()) < BF16, (backend, kernel.reads_blocks)
    assert tested or device_kind() == "rocm", "no backend of this machine attends all requests at once"


def test_graphs_and_one_kernel_at_a_time(tmp_path: Path) -> None:
    """The same answers, up to the first token where the two most likely ones are about equal."""
    launch(Path(__file__).parent / "run_generation.py", tmp_path, ranks=1, timeout=280)
    results: dict[str, Any] = json.loads((tmp_path / "answers.json").read_text())
    expected = results.pop("sdpa, none")
    graphs = results["auto, local"]
    if isinstance(graphs, str):
        assert "needs a GPU, bf16, and flash_attn_3" in graphs
        del results["auto, local"]
    for name, answers in results.items():
        compared = 0
        for answer, reference in zip(answers, expected, strict=True):
            for (token, first, second), (their_token, their_first, their_second) in zip(answer, reference, strict=True):
                assert abs(first - their_first) < CLOSE and abs(second - their_second) < CLOSE, name
                compared += 1
                if token != their_token:
                    assert their_first - their_second < CLOSE, name
                    break
        assert compared > len(expected), name
