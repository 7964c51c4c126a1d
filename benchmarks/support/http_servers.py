"""The servers of the serving benchmark, each in a process of its own: `transformers serve` and `megatron-vlm serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.serving_clients import Ask
from megatron_vlm.config import InferenceConfig
from megatron_vlm.runtime.device import current_device

_START_SECONDS = 120
_TRANSFORMERS = "from transformers.cli.transformers import main; main()"
_MEGATRON_VLM = "from megatron_vlm.text_generation.serve import main; main()"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ServerDidNotStart(Exception):
    """The reason why a server cannot be measured on this machine."""


@contextlib.contextmanager
def transformers_serve(folder: Path, threads: int, bf16: bool = False) -> Iterator[Ask]:
    """transformers' server with the model in `folder`, until the block ends.

    Answers lack special tokens. Raises ServerDidNotStart.
    """
    dtype = "bfloat16" if bf16 else "float32"
    arguments = ["serve", str(folder), "--device", current_device().type, "--dtype", dtype]
    with _running([sys.executable, "-c", _TRANSFORMERS, *arguments], threads) as port:
        yield partial(_stream, port, {"model": str(folder)})


@contextlib.contextmanager
def megatron_vlm_serve(folder: Path, config: InferenceConfig, threads: int) -> Iterator[Ask]:
    """Our server; otherwise as transformers_serve."""
    arguments = [str(folder), "--served-model-name", "model"]
    for name in ("max_tokens", "buffer_size_gb"):
        name = f"inference_dynamic_batching_{name}"
        arguments += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    arguments.append("--enable-prefix-caching" if config.enable_prefix_caching else "--no-enable-prefix-caching")
    with _running([sys.executable, "-c", _MEGATRON_VLM, *arguments], threads) as port:
        yield partial(_stream, port, {"model": "model", "ignore_eos": True})


@contextlib.contextmanager
def _running(command: list[str], threads: int) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=kept | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            if not _is_ready(process, port):
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()]
                raise ServerDidNotStart(lines[-1] if lines else f"no answer within {_START_SECONDS} s")
            yield port
        finally:
            process.terminate()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server answers; False if it ends before, or does not in time."""
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.2)
    return False


def _stream(port: int, fields: dict[str, Any], prompt: list[int], new_tokens: int) -> Iterator[int]:
    """Token ids of a streamed completion."""
    text = " ".join(f"w{token}" for token in prompt)
    body = json.dumps(fields | {"prompt": text, "max_tokens": new_tokens, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answers {response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise RuntimeError(f"the server answers: {chunk['error']}")
                for word in chunk["choices"][0]["text"].split():
                    yield int(word.removeprefix("w"))
