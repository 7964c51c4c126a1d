"""What the routes share: the engine once it is ready, the encoding threads, and the counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.prompts import EncodedPrompt
from megatron_vlm.inference.request import AnyPrompt
from megatron_vlm.inference.server.errors import ApiError, api_error
from megatron_vlm.inference.server.metrics import ServerMetrics
from megatron_vlm.inference.server.settings import ServerSettings

_MOST_CHARACTERS_PER_TOKEN = 256
"""Longer than any token of the supported tokenizers; text of more characters is too long without counting tokens."""


class Backend:
    """Created before the model is loaded; `ready` is called when it is."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.metrics = ServerMetrics(lambda: None if self.unavailable() is not None else self.engine.stats())
        self.status = "The model is being loaded."
        """Why there is no engine."""
        self._engine: Engine | None = None
        self._threads = ThreadPoolExecutor(settings.encode_threads, "encode prompts")

    def ready(self, engine: Engine) -> None:
        """From now on requests are answered."""
        self._engine = engine

    def unavailable(self) -> str | None:
        """Why no request can be answered now."""
        if self._engine is None:
            return self.status
        if self._engine.failure is not None:
            return str(self._engine.failure)
        return None

    @property
    def engine(self) -> Engine:
        """Raises ApiError (503) until it is ready."""
        reason = self.unavailable()
        if reason is not None or self._engine is None:
            raise ApiError(503, reason or self.status, headers={"Retry-After": "5"})
        return self._engine

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) if a request names another model."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here, but {self.settings.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def encode(self, make_prompt: Callable[[], AnyPrompt], text_length: int) -> EncodedPrompt:
        """A prompt's token ids and tiles; made in a thread, since images and texts may take a while.

        Args:
            make_prompt: decodes the images.
            text_length: characters of the prompt's text; a hopelessly long one is not tokenized.

        Raises:
            ApiError: the prompt is invalid.
        """
        engine = self.engine
        if text_length > engine.max_sequence_length * _MOST_CHARACTERS_PER_TOKEN:
            raise ApiError(
                400,
                f"The prompt has {text_length} characters, but a sequence has at most {engine.max_sequence_length} "
                "tokens.",
                code="context_length_exceeded",
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: engine.encode(make_prompt()))
        except ValueError as error:
            raise api_error(error) from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
