"""Metrics for Prometheus, in the formats of its own client library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from megatron_vlm.inference.request import EngineStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_PREFIX = "megatron_vlm"


class ServerMetrics:
    """Counts of the HTTP side, and the engine's."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        """`stats`: the engine's, None as long as no request is answered."""
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "http_responses", "HTTP responses by route and status.", ("route", "status"),
            namespace=_PREFIX, registry=self._registry,
        )  # fmt: skip
        self.first_token = self._histogram("first_token_seconds", "From a request to its first token.")
        self.request = self._histogram("request_seconds", "From a request to its last token.")
        self._registry.register(_EngineCollector(stats))

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, namespace=_PREFIX, buckets=_SECONDS, registry=self._registry)

    def add_response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def page(self, accept: str | None) -> tuple[bytes, str]:
        """The page in the format of a request's Accept header, and its content type."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type


class _EngineCollector(Collector):
    """Asks the engine when the page is read."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        ready = f"{_PREFIX}_ready", "1 if requests are answered."
        yield GaugeMetricFamily(*ready, value=int(stats is not None))
        if stats is not None:
            yield from _families(stats)


def _families(stats: EngineStats) -> Iterator[Metric]:
    gauges = {
        "requests_running": ("Requests in the running batch.", stats.running),
        "requests_waiting": ("Requests in the queue.", stats.waiting),
        "cache_blocks": ("Blocks of the key/value cache.", stats.total_blocks),
        "cache_blocks_free": ("Blocks that no request uses.", stats.free_blocks),
        "generated_tokens_per_second": ("Over the last 10 s.", stats.tokens_per_second),
    }
    counters = {
        "prompt_tokens": ("Prompt tokens of admitted requests.", stats.prompt_tokens),
        "cached_prompt_tokens": ("Prompt tokens found in the prefix cache.", stats.cached_tokens),
        "generated_tokens": ("Generated tokens.", stats.generated_tokens),
        "prefill_seconds": ("Time spent on prompts.", stats.prefill_seconds),
        "decode_seconds": ("Time spent on new tokens.", stats.decode_seconds),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)
    finished = CounterMetricFamily(f"{_PREFIX}_requests_finished", "Finished requests by reason.", labels=["reason"])
    for reason in ("stop", "length", "cancelled"):
        finished.add_metric([reason], stats.finished.get(reason, 0))
    yield finished
