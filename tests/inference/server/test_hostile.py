"""Whatever a client sends: an error with a message, never status 500, and the server still answers afterwards."""

from __future__ import annotations

import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from PIL import Image

from megatron_vlm.inference.server import fetch
from tests.checkpoint_convert.whole_model import SINGLE, WIDE, picture
from tests.inference.server.running import RunningServer, data_url, image_part, png, run_server

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def server_still_answers(server: RunningServer) -> Iterator[None]:
    yield
    assert server.chat("What?", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert max(server.statuses()) < 500


def _message(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    assert message and len(message) < 1100
    return message


def _post(server: RunningServer, content: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
    return server.client.post(path, content=content, headers={"Content-Type": "application/json"} | headers)


def _images(server: RunningServer, *urls: str) -> httpx.Response:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "What?"}]
    return server.client.post(CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 2})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"3", b'"text"', b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000,
        b'{"messages": ' + b"9" * 5000 + b"}", b'{"messages": NaN}', b'{"messages": [], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 400 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": ' + b"9" * 400 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "stop": "\\udfff"}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(server: RunningServer, body: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        _message(_post(server, body, path))
    response = server.client.put("/api", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["message"]


FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "n", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias",
    "frequency_penalty", "response_format", "tools", "modalities",
)  # fmt: skip
WRONG = ("text", -1, 10**30, 1e308, -1e308, [], {}, [[[]]], {"a": {"b": []}}, [None], True, "\x00", "\U0001f600" * 600)


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_types_and_numbers(server: RunningServer, field: str) -> None:
    for value in WRONG:
        body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 1} | {field: value}
        response = server.client.post(CHAT, json=body)
        assert response.status_code in (200, 400, 404), (value, response.text)
        if response.status_code != 200:
            assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "a"}, "the roles user and assistant only"),
        ({"role": "user"}, "messages[0].content: this field is required"),
        ({"role": "user", "content": 3}, "messages[0].content: Input should be a valid string"),
        ({"role": "user", "content": [{"type": "audio"}]}, "'text', 'image_url'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, "image_url: Input should be"),
        ({"role": "user", "content": "<image>"}, "which marks an image in this model's prompts"),
        ({"role": "assistant", "content": "a"}, "The last message must be the user's"),
        ({"role": "user", "content": "a", "tool": 1}, "messages[0].tool: there is no such field"),
    ],
)
def test_wrong_messages_are_named(server: RunningServer, message: dict[str, Any], expected: str) -> None:
    assert expected in _message(server.client.post(CHAT, json={"messages": [message]}))


def test_prompts_that_are_too_long(server: RunningServer) -> None:
    def ask(text: str) -> str:
        return _message(server.client.post(CHAT, json={"messages": [{"role": "user", "content": text}]}))

    assert "a sequence has at most 4096" in ask("What? " * 5000)
    assert "1048577 characters, but a sequence has at most 4096 tokens" in ask("a" * (4096 * 256 + 1))
    many = [{"role": "user", "content": "a"}] * 1025
    assert "messages: List should have at most 1024 items" in _message(
        server.client.post(CHAT, json={"messages": many})
    )


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims, and has, width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(bytes(1 + width // 8)) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_images_that_are_none(server: RunningServer) -> None:
    good = data_url(png(picture(SINGLE)))
    where = "messages[0].content[0].image_url.url"
    assert "text/plain" not in _message(_images(server, data_url(b"no image", "text/plain")))
    assert f"{where}: the image cannot be read: 8 bytes that start with" in _message(
        _images(server, data_url(b"no image"))
    )
    assert "not valid base64" in _message(_images(server, "data:image/png;base64,@@@"))
    assert "a data URL begins like" in _message(_images(server, "data:image/png,abc"))
    assert "Pillow cannot decode" in _message(_images(server, data_url(png(picture(WIDE))[:200])))
    assert "the file is empty" in _message(_images(server, "data:image/png;base64,"))
    assert "messages[0].content[1]" in _message(_images(server, good, "data:image/png;base64,AAAA"))
    assert "has 100 images, but at most 16" in _message(_images(server, *[good] * 100))
    for url in ("/etc/passwd", "file:///etc/passwd", "../secret.png", "ftp://a/b.png", "", "gopher://a"):
        assert "an image is a data URL" in _message(_images(server, url))
    for program in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ):
        assert "cannot be read" in _message(_images(server, data_url(program)))


def test_decompression_bombs_are_not_decoded(server: RunningServer) -> None:
    bomb = _bomb(40_000, 40_000)
    assert len(bomb) < 300_000
    started = time.process_time()
    assert "40000x40000 pixels, more than 40 million" in _message(_images(server, data_url(bomb)))
    half = data_url(_bomb(5_000, 5_000))
    assert "5000x5000 pixels, more than 15 million" in _message(_images(server, half, half))
    assert time.process_time() - started < 20


def test_tall_and_tiny_images_are_answered(server: RunningServer) -> None:
    for size in ((1, 1), (1, 3000), (3000, 2)):
        content = [image_part(Image.new("RGB", size)), {"type": "text", "text": "What?"}]
        assert server.chat(content, max_tokens=1)["usage"]["completion_tokens"] == 1


# ---- limits ----


def test_large_and_slow_requests(server: RunningServer) -> None:
    with run_server(server.engine, max_request_bytes=10_000, request_timeout=0.5) as small:
        body = json.dumps({"messages": [{"role": "user", "content": "a" * 20_000}]}).encode()
        assert "larger than 0.00953674 MiB" in _message(_post(small, body), 413)

        def pieces() -> Iterator[bytes]:  # without a Content-Length
            for start in range(0, len(body), 1000):
                yield body[start : start + 1000]

        response = small.client.post(CHAT, content=pieces(), headers={"Content-Type": "application/json"})
        assert "larger than" in _message(response, 413)

        host, port = small.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            answer = slow.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"The request did not arrive within 0.5 s." in answer
        with socket.create_connection((host, int(port)), timeout=20) as gone:
            gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert small.client.get("/health").status_code == 200


def test_unknown_routes_and_methods(server: RunningServer) -> None:
    for path in (
        "/nothing",
        "/v1/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/a/../../b",
        "/\x00"[:1] + "%00",
    ):
        assert server.client.get(path).status_code == 404, path
    assert "use another method" in server.client.get("/api").json()["message"]
    assert "use another method" in _message(server.client.get(CHAT), 405)
    assert "use another method" in _message(server.client.request("TRACE", CHAT), 405)
    assert "Content-Type: application/json" in _message(_post(server, b"{}", **{"Content-Type": "text/plain"}))


def test_a_full_queue_is_429_with_a_time(server: RunningServer) -> None:
    limit = server.engine.config.max_queued_requests + server.engine.config.inference_max_requests
    prompts = {"prompt": ["What is it?"] * 60, "max_tokens": 20, "temperature": 0}

    def complete(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json=prompts, timeout=120)

    with ThreadPoolExecutor(4) as clients:
        responses = list(clients.map(complete, range(4)))
    statuses = sorted(response.status_code for response in responses)
    assert limit < 60 * 4
    assert statuses[0] == 200 and statuses[-1] == 429, statuses
    for response in responses:
        if response.status_code == 429:
            assert "Too many requests are waiting" in _message(response, 429)
            assert int(response.headers["Retry-After"]) >= 1


def test_a_client_that_goes_away_cancels_its_request(server: RunningServer) -> None:
    cancelled = server.engine.stats().finished.get("cancelled", 0)
    body = {"prompt": "A", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}, timeout=0.3)
    deadline = time.monotonic() + 20
    while server.engine.stats().finished.get("cancelled", 0) < cancelled + 2:
        assert time.monotonic() < deadline, server.engine.stats()
        time.sleep(0.02)
    assert server.engine.stats().running == 0


# ---- images from the network ----


class _ImageHost(BaseHTTPRequestHandler):
    """Plays hosts of the internet, by the name in the request."""

    image = png(picture(WIDE))

    def do_GET(self) -> None:
        host, path = self.headers["Host"].partition(":")[0], self.path
        port = self.server.server_address[1]
        redirects = {
            "/redirect": f"http://images.example:{port}/image",
            "/private": f"http://private.example:{port}/image",
            "/local": f"http://127.0.0.1:{port}/image",
            "/metadata": "http://169.254.169.254/latest",
            "/file": "file:///etc/passwd",
            "/loop": f"http://images.example:{port}/loop",
        }
        if path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[path])
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        self.end_headers()
        if path == "/slow":
            time.sleep(3)
        elif path == "/drip":
            for _ in range(60):
                self.wfile.write(b"a")
                self.wfile.flush()
                time.sleep(0.05)
        elif path == "/huge":
            self.wfile.write(bytes(200_000))
        elif host == "images.example":
            self.wfile.write(self.image)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def images(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunningServer, int]]:
    """A server that may fetch images, and the port of `images.example`, a public host in its eyes.

    The names resolve to addresses that only the test's connections reach.
    """
    host = ThreadingHTTPServer(("127.0.0.1", 0), _ImageHost)
    host.handle_error = lambda *arguments: None  # type: ignore[method-assign]  (clients that close early)
    Thread(target=host.serve_forever, daemon=True).start()
    names = {
        "images.example": ["93.184.216.34"],
        "private.example": ["10.0.0.5"],
        "both.example": ["93.184.216.34", "192.168.1.1"],
        "mapped.example": ["::ffff:127.0.0.1"],
    }
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(name: str, port: int, *rest: Any, **more: Any) -> Any:
        if name not in names:
            return resolve(name, port, *rest, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[name]]

    def create_connection(address: tuple[str, int], *rest: Any) -> socket.socket:
        assert address[0] == "93.184.216.34", f"a connection to {address[0]}"
        return connect(("127.0.0.1", address[1]), *rest)

    monkeypatch.setattr(fetch, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "create_connection", create_connection)
    with run_server(
        server.engine, allow_remote_images=True, max_request_bytes=100_000, request_timeout=1
    ) as open_server:
        yield open_server, host.server_address[1]
    host.shutdown()
    host.server_close()


def test_remote_images(images: tuple[RunningServer, int]) -> None:
    open_server, port = images
    inline = _images(open_server, data_url(_ImageHost.image)).json()["usage"]["prompt_tokens"]
    for path in ("/image", "/redirect", "/image?size=3"):
        response = _images(open_server, f"http://images.example:{port}{path}")
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["prompt_tokens"] == inline


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/image", "is not an address of the public internet"),
        ("http://localhost:{port}/image", "is not an address of the public internet"),
        ("http://[::1]:{port}/image", "is not an address of the public internet"),
        ("http://0x7f.1:{port}/image", "is not an address of the public internet"),
        ("http://2130706433:{port}/image", "is not an address of the public internet"),
        ("http://169.254.169.254/latest", "is not an address of the public internet"),
        ("http://private.example:{port}/image", "is not an address of the public internet"),
        ("http://both.example:{port}/image", "is not an address of the public internet"),
        ("http://mapped.example:{port}/image", "is not an address of the public internet"),
        ("http://images.example:{port}/private", "private.example is not an address of the public internet"),
        ("http://images.example:{port}/local", "127.0.0.1 is not an address of the public internet"),
        ("http://images.example:{port}/metadata", "169.254.169.254 is not an address of the public internet"),
        ("http://images.example:{port}/file", "is not http(s)"),
        ("http://images.example:{port}/loop", "more than 3 redirects"),
        ("http://images.example:{port}/missing", "answered with status 404"),
        ("http://images.example:{port}/huge", "larger than"),
        ("http://images.example:{port}/slow", "did not arrive within 1 s"),
        ("http://images.example:{port}/drip", "did not arrive within 1 s"),
        ("https://images.example:{port}/image", "the connection to images.example failed"),
        ("http://images.example:0/image", "is not http(s)"),
        ("http://images.example:99999/image", "malformed"),
        ("http://user:password@images.example:{port}/image", "addresses with a user"),
        ("http://", "is not http(s)"),
        ("http://images.example:{port}/a b\r\nHost: c", "percent-encoded"),
    ],
)  # fmt: skip
def test_addresses_that_are_not_fetched(images: tuple[RunningServer, int], url: str, reason: str) -> None:
    open_server, port = images
    assert reason in _message(_images(open_server, url.format(port=port)))


def test_nothing_is_fetched_unless_it_is_allowed(server: RunningServer) -> None:
    assert "fetches no images from the network" in _message(_images(server, "https://images.example/a.png"))


def test_addresses_of_the_public_internet() -> None:
    for address in ("93.184.216.34", "8.8.8.8", "2606:2800:220:1::1"):
        assert fetch.is_public(address)
    for address in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::1", "2001:0:1::1", "nonsense", "",
    ):  # fmt: skip
        assert not fetch.is_public(address), address
