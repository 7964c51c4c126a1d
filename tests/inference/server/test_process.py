"""The process: `/health` while the model is being loaded, SIGTERM, exit codes, a Hugging Face folder."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from megatron_vlm.text_generation.serve import main
from tests.inference.server.running import ServerProcess

# A server whose model takes for ever to load.
LOADING = """
import time
from contextlib import contextmanager
from megatron_vlm.inference.server.process import ServerProcess, ServerSettings

@contextmanager
def never():
    time.sleep(600)
    yield

ServerProcess(ServerSettings("tiny", port=0)).run(never())
"""


def _url(server: ServerProcess) -> str:
    return server.wait_for("listening on").split()[2].rstrip(",")


def test_from_start_to_sigterm(folder: Path) -> None:
    with ServerProcess(folder / "source", "--port", "0", "--served-model-name", "tiny") as server:
        url = _url(server)
        server.wait_for("ready")
        health = httpx.get(f"{url}/health")
        assert health.json() == {"status": "ok", "service": "megatron-vlm", "ready": True}

        lines: list[str] = []

        def read_stream() -> None:
            body = {"prompt": "A", "max_tokens": 600, "temperature": 0, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                lines.extend(line for line in response.iter_lines() if line)

        reader = threading.Thread(target=read_stream)
        reader.start()
        deadline = time.monotonic() + 30
        while "megatron_vlm_requests_running 1" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
        server.stop()
        server.wait_for("stopping: 1 requests to finish")
        reader.join(60)
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in lines[-2]
        assert server.end() == 0, server.lines
        assert not any("Traceback" in line for line in server.lines)


def test_while_the_model_is_being_loaded() -> None:
    with ServerProcess(run=["-c", LOADING]) as server:
        url = _url(server)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["details"]) == (503, "The model is being loaded.")
        rejected = httpx.put(f"{url}/api", json={"prompts": ["a"]})
        assert (rejected.status_code, rejected.json()["message"]) == (503, "The model is being loaded.")
        assert "megatron_vlm_ready 0" in httpx.get(f"{url}/metrics").text
        server.stop()
        assert server.end() == 0
        assert server.lines[-1] == "stopped while the model was being loaded\n"


def test_a_wrong_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    assert main([str(tmp_path), "--port", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("listening on http://127.0.0.1:")
    assert captured.err.startswith(f"{tmp_path} is not a model")


def test_a_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([str(tmp_path), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
