"""Clients of the serving benchmark: a fixed number that ask all the time, or requests that arrive at random times."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

Ask = Callable[[list[int], int], Iterator[int]]
"""From a prompt and a number of new tokens to the new token ids, each as soon as it is there."""


@dataclass
class Run:
    """What was measured while all prompts of a run were answered."""

    tokens_per_second: float
    """Generated tokens of all clients together."""
    first_token_seconds: list[float]
    """Of each prompt: from its submission to its first new token."""
    tokens: list[list[int]]
    """New token ids of each prompt."""
    prefill_share: float | None = None
    """Part of the computing time that went into prompts; None: not known."""


def closed_loop(ask: Ask, prompts: Sequence[list[int]], new_tokens: int, num_clients: int) -> Run:
    """Each client submits its next prompt when its last answer is complete; they share the prompts."""
    remaining = iter(range(len(prompts)))
    first, tokens = [0.0] * len(prompts), [[0]] * len(prompts)

    def client(_: int) -> None:
        for number in remaining:
            first[number], tokens[number] = _timed(ask, prompts[number], new_tokens)

    seconds = _in_threads(client, num_clients)
    return Run(len(prompts) * new_tokens / seconds, first, tokens)


def random_arrivals(
    ask: Ask, prompts: Sequence[list[int]], new_tokens: int, requests_per_second: float, seed: int = 0
) -> Run:
    """Requests arrive by a Poisson process, whether or not earlier ones are answered."""
    chance = random.Random(seed)
    arrivals = list(itertools.accumulate(chance.expovariate(requests_per_second) for _ in prompts))
    first, tokens = [0.0] * len(prompts), [[0]] * len(prompts)
    started = time.perf_counter()

    def client(number: int) -> None:
        time.sleep(max(0.0, started + arrivals[number] - time.perf_counter()))
        first[number], tokens[number] = _timed(ask, prompts[number], new_tokens)

    seconds = _in_threads(client, len(prompts))
    return Run(len(prompts) * new_tokens / seconds, first, tokens)


def _timed(ask: Ask, prompt: list[int], new_tokens: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and all tokens."""
    started = time.perf_counter()
    ids = ask(prompt, new_tokens)
    tokens = [next(ids)]
    first = time.perf_counter() - started
    return first, [*tokens, *ids]


def _in_threads(client: Callable[[int], None], count: int) -> float:
    """Run client(0), ..., client(count - 1) at the same time; returns the seconds until all have ended."""
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        for _ in threads.map(client, range(count)):
            pass  # raises the client's error
    return time.perf_counter() - started
