"""Plans of steps with a paged cache."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from megatron_vlm.inference.step_plan import Span, StepPlan


def plan_of(length: int, *spans: tuple[int, int, list[int]]) -> StepPlan:
    """A row of `length` tokens with spans of (tokens, cached tokens, blocks)."""
    positions, placed, start = np.zeros(length, np.int64), [], 0
    for count, context, blocks in spans:
        positions[start : start + count] = np.arange(context, context + count)
        placed.append(Span(start, count, context, blocks))
        start += count
    return StepPlan(np.zeros(length, np.int64), positions, placed, [])


def random_plans(block_size: int) -> Iterator[StepPlan]:
    """Prompts of 1 to 3 blocks, the same in chunks beside requests in decode, then decode of all. Below 64 blocks."""
    chance = random.Random(block_size)
    lengths = [1, block_size, block_size + 1, *(chance.randrange(2, 3 * block_size) for _ in range(5))]
    free = chance.sample(range(1, 64), 63)
    blocks = [[free.pop() for _ in range(-(-(length + 8) // block_size))] for length in lengths]
    done = [0] * len(lengths)
    for step in range(8):
        spans = []
        for request, length in enumerate(lengths):
            if step < request // 2:  # it has not come yet
                continue
            left = length - done[request]
            count = 1 if left <= 0 else chance.randrange(1, left + 1) if step < 5 else left
            used = blocks[request][: -(-(done[request] + count) // block_size)]
            spans.append((count, done[request], used))
            done[request] += count
        yield plan_of(-(-sum(count for count, _, _ in spans) // 8) * 8, *spans)
