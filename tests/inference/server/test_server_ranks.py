"""A server on two ranks: the answers of one, an end that finishes requests, and the death of a rank."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.inference.server.running import TORCHRUN, RunningServer, ServerProcess

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

LAYOUTS = ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"]


class Client(threading.Thread):
    """Reads a long stream; notes its events and when each came."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.url, self.max_tokens = url, max_tokens
        self.events: list[Any] = []
        self.times: list[float] = []
        self.start()

    def run(self) -> None:
        body = {
            "prompt": "A", "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "logprobs": 0,
        }  # fmt: skip
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line if line == "data: [DONE]" else json.loads(line[6:]))
                    self.times.append(time.monotonic())

    def wait_for_event(self) -> None:
        deadline = time.monotonic() + 60
        while not self.events:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _start(folder: Path, layout: str, launcher: str = TORCHRUN) -> ServerProcess:
    server = ServerProcess(folder / "megatron", "--port", "0", layout, "2", ranks=2, launcher=launcher)
    server.wait_for("ready")
    return server


def _url(server: ServerProcess) -> str:
    (line,) = (line for line in server.lines if line.startswith("listening on"))
    return line.split()[2].rstrip(",")


def _rank_process(server: ServerProcess, rank: int) -> psutil.Process:
    ranks = psutil.Process(server.process.pid).children()
    return next(process for process in ranks if process.environ().get("RANK") == str(rank))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_answer_like_one_and_finish_after_sigterm(server: RunningServer, folder: Path, layout: str) -> None:
    body = {"prompt": ["What is the colour?", "A red dog."], "max_tokens": 12, "temperature": 0}
    expected = server.client.post("/v1/completions", json=body).json()["choices"]
    with _start(folder, layout, "megatron_vlm.launch") as ranks:  # torchrun would kill the ranks after 30 s
        url = _url(ranks)
        choices = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert [choice["text"] for choice in choices] == [choice["text"] for choice in expected]
        client = Client(url, 200)
        client.wait_for_event()
        ranks.stop()
        assert ranks.end(240) == 128 + signal.SIGTERM  # the launcher's own, when all ranks have ended
        client.join(10)
        assert client.events[-1] == "data: [DONE]"
        assert client.events[-2]["choices"][0]["finish_reason"] == "length"
        output = "".join(ranks.lines)
        assert "stopping: 1 requests to finish" in output
        assert "has failed" not in output


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_rank(folder: Path, layout: str, busy: bool) -> None:
    with _start(folder, layout) as ranks:
        url = _url(ranks)
        clients = [Client(url, 3500) for _ in range(3 if busy else 0)]
        for client in clients:
            client.wait_for_event()
        killed = time.monotonic()
        os.kill(_rank_process(ranks, 1).pid, signal.SIGKILL)
        for client in clients:
            client.join(20)
            assert not client.is_alive()
            assert "The engine has failed" in client.events[-2]["error"]["message"], client.events[-2:]
            assert client.events[-1] == "data: [DONE]"
            assert client.times[-1] - killed < 5
        assert ranks.end() != 0
        assert time.monotonic() - killed < 60
        output = "".join(ranks.lines)
        if busy:
            assert "[rank 0] The engine has failed: another rank of the model has ended" in output
        assert "exitcode" in output and "-9" in output, output
