"""What every request passes first: its API key, the size of its body, and the time in which it arrives."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_vlm.inference.server.errors import ApiError
from megatron_vlm.inference.server.metrics import ServerMetrics
from megatron_vlm.inference.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/docs", "/openapi.json"})
"""Answered without an API key: they tell nothing about requests or the model."""
_BODIES_AT_ONCE = 16
"""Bodies of the largest size that may be in memory at the same time; further requests have to come again."""


class Limits:
    """ASGI middleware. The application behind it receives each body whole."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics, routes: Iterable[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._routes = frozenset(routes)
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.add_response(route, message["status"])
            await send(message)

        body = b""
        try:
            self._check_key(Request(scope))
            body = await self._read(Request(scope), receive)
            await self._app(scope, _replay(body, receive), counted_send)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, counted_send)
        finally:
            self._body_bytes -= len(body)

    def _check_key(self, request: Request) -> None:
        if not self._settings.api_keys or request.url.path in OPEN_PATHS:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, known.encode()) for known in self._settings.api_keys]  # in equal time
        if not any(matches):
            raise ApiError(
                401,
                "This server needs an API key, and this is none of its keys. Send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, request: Request, receive: Receive) -> bytes:
        """The body; its length is added to the bytes that are in memory, and the caller takes it off again."""
        limit = self._settings.max_request_bytes
        announced = request.headers.get("content-length", "0")
        closing = {"Connection": "close"}
        too_large = ApiError(413, f"The request is larger than {limit / 2**20:g} MiB.", headers=closing)
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The connection was closed before the whole request had arrived.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    self._body_bytes += len(chunk)
                    if size > limit:
                        raise too_large
                    if self._body_bytes > _BODIES_AT_ONCE * limit:
                        raise ApiError(
                            429,
                            "Too many large requests at the same time. Try again later.",
                            headers={"Retry-After": "5"},
                        )
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except BaseException as error:
            self._body_bytes -= size
            if isinstance(error, TimeoutError):
                seconds = self._settings.request_timeout
                raise ApiError(408, f"The request did not arrive within {seconds:g} s.", headers=closing) from error
            raise


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
