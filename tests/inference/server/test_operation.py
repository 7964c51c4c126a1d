"""`/metrics` in the eyes of Prometheus' own parser, and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.inference.server.running import RunningServer


def _metrics(server: RunningServer) -> dict[str, float]:
    response = server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            labels = "".join(f" {name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("megatron_vlm_") + labels] = sample.value
    return found


def test_metrics_count_requests_and_tokens(server: RunningServer) -> None:
    before = _metrics(server)
    answer = server.chat("What is the colour?", max_tokens=5, ignore_eos=True)
    server.client.post("/v1/chat/completions", json={})
    server.client.get("/nothing/of/the/kind")
    after = _metrics(server)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert after["ready"] == 1
    assert more("generated_tokens_total") == 5
    assert more("prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert more("requests_finished_total reason=length") == 1
    assert more("http_responses_total route=/v1/chat/completions status=200") == 1
    assert more("http_responses_total route=/v1/chat/completions status=400") == 1
    assert more("http_responses_total route=other status=404") == 1
    for histogram in ("first_token_seconds", "request_seconds"):
        assert more(f"{histogram}_count") == more(f"{histogram}_bucket le=+Inf") == 1
        assert 0 < more(f"{histogram}_sum") < 60
    assert after["cache_blocks_free"] == after["cache_blocks"]


def test_newer_formats_are_answered_in_kind(server: RunningServer) -> None:
    response = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "megatron_vlm_ready 1.0\n" in response.text and response.text.endswith("# EOF\n")


def test_the_openapi_document_describes_every_request(server: RunningServer) -> None:
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    bodies = {"/v1/chat/completions": "post", "/v1/completions": "post", "/api": "put"}
    for path, method in bodies.items():
        schema = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
        assert document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["additionalProperties"] is False
        assert set(document["paths"][path][method]["responses"]) == {"200", "4XX", "5XX"}
    assert set(document["paths"]) == {*bodies, "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
    assert server.client.get("/docs").status_code == 200
