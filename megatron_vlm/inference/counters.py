"""Counts of an engine since it started."""

from __future__ import annotations

import time
from collections import Counter, deque

from megatron_vlm.inference.request import TokenOutput
from megatron_vlm.inference.scheduler import Request, Step

_RATE_WINDOW = 10.0
"""Seconds over which `tokens_per_second` is measured."""


class EngineCounters:
    """Written by the engine's thread; read by any."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        """Finish reason -> requests."""
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.request_seconds = 1.0
        """Moving average of the time from submission to the last token."""
        self._recent: deque[tuple[float, int]] = deque()

    def add_step(self, step: Step, outputs: list[tuple[Request, TokenOutput]], seconds: float) -> None:
        tokens = sum(part.length for part in step.parts)
        prefill = sum(part.length for part in step.parts if part.is_prefill) / tokens
        self.prefill_seconds += seconds * prefill
        self.decode_seconds += seconds * (1 - prefill)
        generated = sum(output.token_id is not None for _, output in outputs)
        self.generated_tokens += generated
        self._recent.append((time.monotonic(), generated))
        while self._recent and self._recent[0][0] < time.monotonic() - _RATE_WINDOW:
            self._recent.popleft()

    def add_admitted(self, request: Request) -> None:
        self.prompt_tokens += request.prompt_length
        self.cached_tokens += request.handle.cached_tokens

    def add_finished(self, request: Request, reason: str) -> None:
        self.finished[reason] += 1
        self.request_seconds += 0.1 * (time.monotonic() - request.submitted - self.request_seconds)

    def tokens_per_second(self) -> float:
        """Generated tokens per second over the last 10 s."""
        since = time.monotonic() - _RATE_WINDOW
        return sum(count for moment, count in tuple(self._recent) if moment >= since) / _RATE_WINDOW
