"""Metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

from megatron_vlm.inference.request import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_PREFIX = "megatron_vlm_"


class Histogram:
    """Durations in seconds. Used by the server's thread only."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, text: str) -> Iterable[str]:
        yield from _head(name, "histogram", text)
        total = 0
        for bound, count in zip([*map(str, _BUCKETS), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{_PREFIX}{name}_bucket{{le="{bound}"}} {total}'
        yield f"{_PREFIX}{name}_sum {self._sum}"
        yield f"{_PREFIX}{name}_count {total}"


class ServerMetrics:
    """Counts of the HTTP side."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """(route, status) -> responses."""
        self.first_token = Histogram()
        self.request = Histogram()

    def text(self, ready: bool, stats: EngineStats | None) -> str:
        """The page."""
        lines = [*_value("ready", "gauge", "1 if requests are answered.", int(ready))]
        lines += _head("http_responses_total", "counter", "HTTP responses by route and status.")
        for (route, status), count in sorted(self.responses.items()):
            lines.append(f'{_PREFIX}http_responses_total{{route="{route}",status="{status}"}} {count}')
        lines += self.first_token.lines("first_token_seconds", "From a request to its first token.")
        lines += self.request.lines("request_seconds", "From a request to its last token.")
        if stats is not None:
            lines += _engine_lines(stats)
        return "\n".join(lines) + "\n"


def _engine_lines(stats: EngineStats) -> Iterable[str]:
    gauges = {
        "requests_running": ("Requests in the running batch.", stats.running),
        "requests_waiting": ("Requests in the queue.", stats.waiting),
        "cache_blocks": ("Blocks of the key/value cache.", stats.total_blocks),
        "cache_blocks_free": ("Blocks that no request uses.", stats.free_blocks),
        "generated_tokens_per_second": ("Over the last 10 s.", stats.tokens_per_second),
    }
    counters = {
        "prompt_tokens_total": ("Prompt tokens of admitted requests.", stats.prompt_tokens),
        "cached_prompt_tokens_total": ("Prompt tokens found in the prefix cache.", stats.cached_tokens),
        "generated_tokens_total": ("Generated tokens.", stats.generated_tokens),
        "prefill_seconds_total": ("Time spent on prompts.", stats.prefill_seconds),
        "decode_seconds_total": ("Time spent on new tokens.", stats.decode_seconds),
    }
    for kind, metrics in (("gauge", gauges), ("counter", counters)):
        for name, (text, value) in metrics.items():
            yield from _value(name, kind, text, value)
    yield from _head("requests_finished_total", "counter", "Finished requests by reason.")
    for reason in ("stop", "length", "cancelled"):
        yield f'{_PREFIX}requests_finished_total{{reason="{reason}"}} {stats.finished.get(reason, 0)}'


def _head(name: str, kind: str, text: str) -> Iterable[str]:
    yield f"# HELP {_PREFIX}{name} {text}"
    yield f"# TYPE {_PREFIX}{name} {kind}"


def _value(name: str, kind: str, text: str, value: float) -> Iterable[str]:
    yield from _head(name, kind, text)
    yield f"{_PREFIX}{name} {value}"
