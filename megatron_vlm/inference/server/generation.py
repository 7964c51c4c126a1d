"""The engine's requests behind one HTTP request: submitted together, read by the event loop, cancelled together."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request

from megatron_vlm.inference.prompts import EncodedPrompt
from megatron_vlm.inference.request import EngineError, Handle, SamplingParams, TokenOutput
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import ApiError, api_error

_CLIENT_GONE = 499
"""nginx's status for a client that closed the connection; only the metrics see it."""


class Generation:
    """Requests that end with their client's connection. Close it, or use it as an async context manager."""

    def __init__(
        self, backend: Backend, http: Request, prompts: Sequence[EncodedPrompt], params: Sequence[SamplingParams]
    ) -> None:
        """Submit all of them, or none.

        Raises:
            ApiError: a prompt is too long, or the engine cannot take all of them.
        """
        self._backend, self._http = backend, http
        self._started = time.monotonic()
        self._client_gone = False
        self.handles: list[Handle] = []
        self._wakes = [asyncio.Event() for _ in prompts]
        engine, loop = backend.engine, asyncio.get_running_loop()
        try:
            for prompt, param, wake in zip(prompts, params, self._wakes, strict=True):
                self.handles.append(engine.submit(prompt, param, _notifier(loop, wake)))
        except (ValueError, RuntimeError) as error:
            self._cancel()
            raise api_error(error) from error
        self._watch = asyncio.create_task(self._cancel_when_client_is_gone())

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what still runs."""
        self._watch.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for handle in self.handles:
            if handle.finish_reason is None:
                handle.cancel()

    async def _cancel_when_client_is_gone(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True
        self._cancel()

    async def outputs(self, index: int) -> AsyncIterator[TokenOutput]:
        """The tokens of the request of this index, as they are generated.

        Raises:
            ApiError: the engine stopped, or the request was cancelled.
        """
        handle, wake, metrics = self.handles[index], self._wakes[index], self._backend.metrics
        first = True
        while handle.finish_reason is None:
            wake.clear()
            try:
                output = handle.next_output(timeout=0)
            except queue.Empty:
                await wake.wait()
                continue
            except EngineError as error:
                raise api_error(error) from error
            if output.finish_reason == "cancelled":
                if self._client_gone:
                    raise ApiError(_CLIENT_GONE, "The client closed the connection.")
                raise ApiError(503, "The request was cancelled, because the server is being stopped.")
            if first:
                metrics.first_token.observe(time.monotonic() - self._started)
                first = False
            yield output
        metrics.request.observe(time.monotonic() - self._started)

    async def all_outputs(self) -> list[list[TokenOutput]]:
        """The tokens of every request, when all have ended."""
        return [[output async for output in self.outputs(index)] for index in range(len(self.handles))]


def _notifier(loop: asyncio.AbstractEventLoop, wake: asyncio.Event) -> Callable[[], None]:
    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(wake.set)

    return notify
