"""A local S3 server for tests, behind a proxy that can return errors, stall and truncate."""

from __future__ import annotations

import http.client
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BUCKET = "data"


@dataclass
class Fault:
    """A fault that the proxy injects into matching requests."""

    kind: str
    """error: status 500; stall: half of the body, then nothing; disconnect: half of the body, then the connection
    closes; truncate: half of the body with its own Content-Length; hang: nothing is done, and no answer comes"""
    part: str
    """Regular expression that is found in the request paths that match."""
    times: int = 10**9
    """Requests left to fail."""
    method: str = "GET"


@dataclass
class Proxy:
    """State of the proxy between a client and the server."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of all requests so far."""
    keys: set[str] = field(default_factory=set)
    """Access keys that signed the requests."""

    def matching(self, method: str, path: str) -> str | None:
        self.requests.append((method, path))
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.part, path):
                fault.times -= 1
                return fault.kind
        return None


@contextmanager
def fast_retries(running: Proxy, attempts: int, timeout: float) -> Iterator[Proxy]:
    """Inside the block, failed requests are tried again at once; afterwards the store is empty and has no faults."""
    from megatron_vlm.runtime.s3 import client, objects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "retry_policy", client.RetryPolicy(attempts, first_delay=0.02, timeout=timeout))
        yield running
    running.faults.clear()
    running.requests.clear()
    objects.remove_folder(f"s3://{BUCKET}")


@contextmanager
def server() -> Iterator[int]:
    """An empty S3 server; yields its port."""
    from moto.server import ThreadedMotoServer

    # Its threads would log each request with pytest's handlers. A process that a test forks at such a moment inherits
    # a locked file buffer, and waits forever at its own first message.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    instance = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    instance.start()
    port = instance.get_host_and_port()[1]
    reset = http.client.HTTPConnection("127.0.0.1", port)
    reset.request("POST", "/moto-api/reset")  # all servers of a process have the same content
    assert reset.getresponse().status == 200
    reset.close()
    yield port
    instance.stop()


@contextmanager
def proxy(server_port: int) -> Iterator[Proxy]:
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = state.matching(self.command, self.path)
            signed = self.headers.get("Authorization") or ""
            state.keys.add(signed.partition("Credential=")[2].partition("/")[0])
            if fault == "error":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "hang":
                stop.wait(60)
                self.close_connection = True
                return
            connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            sent = content[: len(content) // 2] if fault else content
            length = len(sent) if fault == "truncate" else len(content)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            if self.command == "HEAD":
                self.send_header("Content-Length", answer.getheader("Content-Length") or "0")
            elif answer.status != 204:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(sent)
            self.wfile.flush()
            if fault == "stall":
                stop.wait(60)
            if fault:
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

        def log_message(self, *_: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """No traceback for clients that are killed: a print by a thread is as bad for a fork as its log."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    listener = Listener(("127.0.0.1", 0), Handler)
    state = Proxy(listener.server_address[1])
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield state
    stop.set()
    listener.shutdown()
    listener.server_close()


@contextmanager
def store() -> Iterator[Proxy]:
    """An S3 server with an empty bucket behind a proxy, and environment variables that point boto3 to the proxy."""
    with server() as port, proxy(port) as state, pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{state.port}")
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }.items():
            patch.setenv(name, value)
        from megatron_vlm.runtime.s3 import client

        client.client_of.cache_clear()
        client.client().create_bucket(Bucket=BUCKET)
        yield state
        client.client_of.cache_clear()


def put_folder(folder: Path, url: str) -> None:
    """Upload a folder's files without verification."""
    from megatron_vlm.runtime.s3 import join, objects

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            objects.write(path.read_bytes(), join(url, str(path.relative_to(folder))))


def wait_for(condition: Any, seconds: float) -> None:
    """Poll until `condition()` is true; fails after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"the condition was not met within {seconds} s"
        time.sleep(0.1)
