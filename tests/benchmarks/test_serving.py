"""The serving benchmark runs with a small model, and all sides generate the same tokens."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import GENERATE, PROMPTS_PER_CLIENT, SERVE, different_tokens
from benchmarks.support import http_servers
from benchmarks.support.serving_clients import Run, closed_loop, random_arrivals
from tests.support.forked_ranks import launch_forked

OURS = "megatron-vlm serve, 3 clients"


def test_the_benchmark_runs(tmp_path: Path) -> None:
    sizes = ["--hidden-size", "64", "--num-layers", "1", "--clients", "1", "3", "--new-tokens", "5"]
    sizes += ["--prompt-tokens", "20", "90", "--baseline-prompts", "2", "--max-tokens", "32", "--threads", "1"]
    done = launch_forked("-m", "benchmarks.serving", *sizes, "--output", tmp_path, ranks=1, timeout=100)
    assert "| engine, 3 clients, 5 new tokens" in done.stdout
    assert "5 new tokens: the median first token at half of capacity takes" in done.stdout
    written = json.loads((tmp_path / "serving.json").read_text())
    assert written["problems"] == []
    (decode,) = written["decode"].values()
    assert "CUDA graphs were not measured: cuda_graph_impl = local: needs a GPU" in done.stdout
    assert "3 requests in decode, " in done.stdout and decode["context"] >= 55
    assert decode["bytes_read"] > 3 * 55 * 2 * 64 * 4 and decode["memory_bytes_per_second"] > 0 < decode["seconds"]
    runs = written["results"]["5"]
    engine = [f"engine, {what}" for what in ("1 client", "3 clients", "first tokens of one request at a time")]
    assert list(runs) == ["transformers", *engine, "engine, at half of capacity", OURS, "transformers serve"]
    assert len(runs["transformers"]["first_token_seconds"]) == 4  # two prompts, before and after the engine
    for name, figures in runs.items():
        assert figures["tokens_per_second"] > 0
        assert (
            figures["prefill_share"] is None
            if name in (OURS, "transformers serve")
            else 0 < figures["prefill_share"] <= 1
        )
    for name, prompts in (
        (OURS, 3 * PROMPTS_PER_CLIENT),
        ("engine, 3 clients", 3 * PROMPTS_PER_CLIENT),
        ("engine, at half of capacity", 6),
    ):
        assert len(runs[name]["first_token_seconds"]) == prompts


def test_it_runs_in_bf16(tmp_path: Path) -> None:
    """As `make gpu-check` does; tokens may differ."""
    sizes = ["--hidden-size", "64", "--num-layers", "1", "--clients", "2", "--new-tokens", "5", "--bf16"]
    sizes += ["--prompt-tokens", "20", "90", "--baseline-prompts", "1", "--max-tokens", "32", "--threads", "1"]
    done = launch_forked("-m", "benchmarks.serving", *sizes, "--output", tmp_path, ranks=1, timeout=100)
    assert "| engine, 2 clients, 5 new tokens" in done.stdout and "| transformers serve, 5 new tokens" in done.stdout


def test_graphs_are_measured_where_they_can_be(tmp_path: Path) -> None:
    sizes = ["--hidden-size", "64", "--num-layers", "1", "--clients", "2", "--new-tokens", "5"]
    sizes += ["--prompt-tokens", "20", "90", "--baseline-prompts", "1", "--max-tokens", "32", "--threads", "1"]
    script = Path(__file__).parent / "run_serving_with_graphs.py"
    done = launch_forked(script, *sizes, "--output", tmp_path, ranks=1, timeout=100)
    assert "| engine with CUDA graphs, 2 clients, 5 new tokens" in done.stdout
    assert "\nCUDA graphs: 2 requests in decode, " in done.stdout
    assert list(json.loads((tmp_path / "serving.json").read_text())["decode"]) == [
        "one kernel at a time",
        "CUDA graphs",
    ]


def test_other_tokens_are_reported() -> None:
    def run(*tokens: list[int]) -> Run:
        return Run(1.0, [], list(tokens))

    runs = {GENERATE: run([1, 9]), "engine, 1 client": run([1, 2]), SERVE: run([1])}
    assert different_tokens({8: runs}, range(8)) == ["8 new tokens: the engine and transformers' generate differ"]
    runs |= {"engine, 1 client": run([1, 9]), SERVE: run([1, 9])}
    assert different_tokens({8: runs}, range(8)) == [
        "8 new tokens: transformers serve and transformers' generate differ"
    ]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(http_servers.ServerDidNotStart, match="Unrecognized processing class"),
        http_servers.transformers_serve(tmp_path, 1),
    ):
        pass


def _ask(prompt: list[int], new_tokens: int) -> Iterator[int]:
    """Waits as many milliseconds as the first token of the prompt says before the first new token."""
    time.sleep(prompt[0] / 1000)
    yield from itertools.repeat(prompt[0], new_tokens)


def test_clients_share_the_prompts() -> None:
    run = closed_loop(_ask, [[10], [60], [20], [30]], 2, 2)
    assert run.tokens == [[10, 10], [60, 60], [20, 20], [30, 30]]
    for seconds, milliseconds in zip(run.first_token_seconds, (10, 60, 20, 30), strict=True):
        assert seconds >= milliseconds / 1000
    assert run.tokens_per_second <= 8 / 0.060


def test_random_arrivals_do_not_wait_for_answers() -> None:
    """100 requests per second of 0.2 s each: one after the other they would take 4 s."""
    started = time.perf_counter()
    run = random_arrivals(_ask, [[200]] * 20, 3, 100)
    assert time.perf_counter() - started < 3
    assert run.tokens == [[200] * 3] * 20
    assert min(run.first_token_seconds) >= 0.2
