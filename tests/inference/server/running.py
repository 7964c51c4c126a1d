"""A server on a free port, in this process or in one of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from megatron_vlm.config import InferenceConfig
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.server.app import create_app
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.settings import ServerSettings
from tests.support.launch import ROOT

TORCHRUN = "torch.distributed.run"
SERVE = ("-m", "megatron_vlm.text_generation.serve")

CONFIG = InferenceConfig(
    inference_max_requests=8,
    inference_dynamic_batching_max_tokens=256,
    inference_dynamic_batching_block_size=16,
    max_queued_requests=64,
    max_cached_images=4,
)


@dataclass
class RunningServer:
    """A server in this process, whose engine can be asked directly."""

    url: str
    engine: Engine
    backend: Backend
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def chat(self, content: Any, **fields: Any) -> dict[str, Any]:
        """The answer to one message."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8} | fields
        response = self.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def statuses(self) -> set[int]:
        """Of all responses so far."""
        page = self.backend.metrics.page(None)[0].decode()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return {int(sample.labels["status"]) for sample in samples if "status" in sample.labels}


@contextlib.contextmanager
def run_server(engine: Engine, **settings: Any) -> Iterator[RunningServer]:
    """A server for an engine, in a thread."""
    backend = Backend(ServerSettings(model_name="tiny", **settings))
    backend.ready(engine)
    config = uvicorn.Config(create_app(backend), log_config=None, access_log=False, lifespan="off")
    http = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=http.run, args=[[listener]], daemon=True)
        thread.start()
        server = RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, backend)
        try:
            with server.client:
                yield server
        finally:
            http.should_exit = True
            thread.join(20)
            backend.close()
    assert not thread.is_alive(), "a request was not answered"


class ServerProcess:
    """`megatron-vlm serve`, or other Python; its output is read line by line."""

    def __init__(
        self, *arguments: str | Path, ranks: int = 1, run: Sequence[str] = SERVE, launcher: str = TORCHRUN
    ) -> None:
        torchrun = ["-m", launcher, "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, *run, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put("")

    def wait_for(self, text: str, timeout: float = 120) -> str:
        """The first line from now on that has `text`."""
        deadline = time.monotonic() + timeout
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line, f"the server ended: {''.join(self.lines)}"
            self.lines.append(line)
            if text in line:
                return line

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self, timeout: float = 60) -> int:
        """The exit code; all output is in `lines` afterwards."""
        code = self.process.wait(timeout)
        while line := self._queue.get(timeout=10):
            self.lines.append(line)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(image))}}
