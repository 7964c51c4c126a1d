"""A local stub of the Hugging Face hub: as much of its API as an upload of a folder uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class Hub:
    """What clients uploaded."""

    endpoint: str = ""
    """For HF_ENDPOINT."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> path -> content."""
    tokens: set[str] = field(default_factory=set)
    """That requests were authorised with."""
    _large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any] | None:
        """The JSON answer to a request; None: there is no such route."""
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "large":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self._large[parts[1]] = body
            return {}
        content = json.loads(body) if body and not path.startswith("/api/models/") else None
        if path == "/api/repos/create":
            assert content is not None
            name = "/".join(filter(None, (content.get("organization"), content["name"])))
            self.files.setdefault(name, {})
            return {"url": f"{self.endpoint}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user"}
        if path.endswith("/info/lfs/objects/batch"):
            assert content is not None
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.endpoint}/large/{item['oid']}"}}}
                for item in content["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._of_repository("/".join(parts[2:4]), parts[4:], body)
        return None

    def _of_repository(self, name: str, route: list[str], body: bytes) -> dict[str, Any] | None:
        kept = self.files.setdefault(name, {})
        if route[:1] == ["preupload"]:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return {"files": modes}
        if route[:1] == ["commit"]:
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    kept[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    kept[value["path"]] = self._large[value["oid"]]
            return {"commitUrl": f"{self.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        if not route or route[0] in ("revision", "tree"):
            return {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in kept]}
        return None


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stub without repositories."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            state.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
            answer = state.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer if answer is not None else {"error": "no such route in the stub"}).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_PUT = do_HEAD = do_POST = _answer

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{listener.server_address[1]}"
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        listener.shutdown()
        listener.server_close()
