"""Thousands of requests, many cancelled or invalid: every one is answered or rejected with a reason, nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest

from megatron_vlm.inference.request import Handle
from tests.checkpoint_convert.whole_model import SINGLE, TALL, picture
from tests.inference.server.running import RunningServer, image_part

CLIENTS = 24
IMAGES = [image_part(picture(SINGLE, 1)), image_part(picture(TALL, 2))]
WORDS = ("red", "dog", "what", "colour", "is", "it", "yes", "no")
INVALID: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "a"}], "temperature": -1},
    {"messages": [{"role": "user", "content": [IMAGES[0]] * 17}]},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**6},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
]


def _request(chance: random.Random) -> dict[str, Any]:
    text = " ".join(chance.choices(WORDS, k=chance.randrange(1, 30)))
    images = chance.sample(IMAGES, chance.choice([0, 0, 0, 1, 2]))
    return {
        "messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}],
        "max_tokens": chance.randrange(1, 12),
        "temperature": chance.choice([0, 1]),
        "stream": chance.random() < 0.5,
        "n": chance.choice([1, 1, 1, 2]) if chance.random() < 0.5 else None,
    }


async def _one(client: httpx.AsyncClient, chance: random.Random, number: int) -> str:
    """What became of a request."""
    if number % 10 == 3:
        response = await client.post("/v1/chat/completions", json=chance.choice(INVALID))
        assert response.status_code == 400 and response.json()["error"]["message"]
        return "invalid"
    body = _request(chance)
    if body["n"] == 2:
        body["temperature"] = 1
    if number % 10 == 7:
        body |= {"stream": True, "max_tokens": 2000, "ignore_eos": True, "n": 1}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 200:
                lines = response.aiter_lines()
                for _ in range(chance.randrange(1, 6)):
                    await anext(lines)
                return "cancelled"
            await response.aread()
    else:
        response = await client.post("/v1/chat/completions", json=body)
    if response.status_code == 429:
        assert int(response.headers["Retry-After"]) >= 1 and response.json()["error"]["message"]
        return "queue full"
    assert response.status_code == 200, response.text
    if body["stream"]:
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    else:
        assert len(response.json()["choices"]) == (body["n"] or 1)
    return "answered"


async def _soak(server: RunningServer, numbers: range) -> Counter[str]:
    results: Counter[str] = Counter()
    remaining = iter(numbers)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def work(seed: int) -> None:
            chance = random.Random(seed)
            for number in remaining:
                results[await _one(client, chance, number)] += 1

        async with asyncio.TaskGroup() as group:
            for seed in range(CLIENTS):
                group.create_task(work(seed))
        while server.engine.stats().running or server.engine.stats().waiting:
            await asyncio.sleep(0.05)
    return results


def _check(server: RunningServer, count: int) -> None:
    process = psutil.Process()
    asyncio.run(_soak(server, range(max(count // 10, 5 * CLIENTS))))  # warm-up: threads and caches come into being
    gc.collect()
    threads, files, memory = threading.active_count(), process.num_fds(), process.memory_info().rss
    finished = server.engine.stats().finished
    results = asyncio.run(_soak(server, range(count)))
    assert results["invalid"] == count // 10
    assert results["answered"] > count / 2
    assert results.total() == count
    gc.collect()
    stats = server.engine.stats()
    assert stats.free_blocks == stats.total_blocks
    assert stats.finished["cancelled"] - finished.get("cancelled", 0) >= results["cancelled"] * 0.9
    kept = sum(type(item) is Handle for item in gc.get_objects())
    assert kept <= server.engine.config.inference_max_requests, "only the last step's requests may be remembered"
    assert threading.active_count() <= threads
    assert process.num_fds() <= files + 2
    grown = (process.memory_info().rss - memory) / 2**20
    print(f"{count} requests: {dict(results)}, memory grew by {grown:.1f} MiB")
    assert grown < 100
    assert server.chat("What?", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert max(server.statuses()) < 500


def test_a_hundred_requests(server: RunningServer) -> None:
    _check(server, 100)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_ten_thousand_requests(server: RunningServer) -> None:
    _check(server, 10_000)
