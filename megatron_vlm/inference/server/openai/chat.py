"""`POST /v1/chat/completions`"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.inference.request import Prompt, TokenOutput
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import ApiError
from megatron_vlm.inference.server.generation import Generation
from megatron_vlm.inference.server.images import load_images
from megatron_vlm.inference.server.merge_streams import merge
from megatron_vlm.inference.server.openai.common import (
    event_stream,
    json_number,
    new_id,
    sampling_params,
    token_text,
    usage,
)
from megatron_vlm.inference.server.openai.schema import ChatRequest, ImagePart, Message

_ROLES = {"user": "human", "assistant": "gpt"}


def read_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[tuple[str, str]]]:
    """The turns of the model's chat template, and (field, address) of each image.

    The images of a message come before its text, as in training.

    Raises:
        ApiError: a role that the template does not have, an image in an answer, or a placeholder in a text.
    """
    turns, urls = [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role not in _ROLES:
            raise ApiError(
                400,
                f"{where}.role is {message.role!r}: this model's chat template has the roles user and assistant only. "
                "Write instructions into the first question.",
                param=f"{where}.role",
            )
        parts = message.content if isinstance(message.content, list) else []
        text = message.content if isinstance(message.content, str) else ""
        marks = ""
        for index, part in enumerate(parts):
            if isinstance(part, ImagePart):
                urls.append((f"{where}.content[{index}].image_url.url", part.image_url.url))
                marks += f"{IMAGE_PLACEHOLDER}\n"
            else:
                text += part.text
        if message.role == "user" and IMAGE_PLACEHOLDER in text:
            raise ApiError(
                400,
                f"{where}: the text has {IMAGE_PLACEHOLDER}, which marks an image in this model's prompts. Send images "
                "as parts of type image_url, and leave it out.",
                param=f"{where}.content",
            )
        if message.role == "assistant" and marks:
            raise ApiError(400, f"{where}: only a user's message can have images.", param=f"{where}.content")
        turns.append(Turn(_ROLES[message.role], marks + text))
    if turns[-1].role != "human":
        raise ApiError(400, "The last message must be the user's: the model answers it.", param="messages")
    return turns, urls


def chat_router(backend: Backend) -> APIRouter:
    """The route, with and without /v1."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=None, summary="Answer a conversation with images")
    @router.post("/chat/completions", response_model=None, include_in_schema=False)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        backend.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true.", param="top_logprobs")
        if body.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0: an answer has at least one token.", param="max_tokens")
        turns, urls = read_messages(body.messages)
        images = await load_images(urls, backend.settings)
        prompt = await backend.encode(lambda: Prompt(turns, images()), sum(len(turn.text) for turn in turns))
        params = sampling_params(
            body,
            backend,
            prompt,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        generation = Generation(backend, http, [prompt] * len(params), params)
        answer = _Answer(backend, generation, bool(body.logprobs))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return event_stream(answer.chunks(include_usage), generation)
        async with generation:
            return JSONResponse(await answer.whole())

    return router


class _Answer:
    """The answers to one request, whole or in chunks."""

    def __init__(self, backend: Backend, generation: Generation, logprobs: bool) -> None:
        self._generation, self._tokenizer, self._logprobs = generation, backend.engine.tokenizer, logprobs
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": backend.settings.model_name}

    async def whole(self) -> dict[str, Any]:
        choices = []
        answers = await self._generation.all_outputs()
        for index, outputs in enumerate(answers):
            text = "".join(output.text_delta for output in outputs)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": self._logprobs_of(outputs),
                    "finish_reason": outputs[-1].finish_reason,
                }
            )
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self._generation.handles[:1], sum(map(len, answers))),
        }

    async def chunks(self, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        generation, completion_tokens = self._generation, 0
        for index in range(len(generation.handles)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        streams = [generation.outputs(index) for index in range(len(generation.handles))]
        async for index, output in merge(streams):
            completion_tokens += output.token_id is not None
            if output.text_delta or self._logprobs:
                yield self._chunk(index, {"content": output.text_delta}, self._logprobs_of([output]))
            if output.finish_reason:
                yield self._chunk(index, {}, finish_reason=output.finish_reason)
        if include_usage:
            yield {
                **self._head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage(generation.handles[:1], completion_tokens),
            }

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs_of(self, outputs: Sequence[TokenOutput]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    **_token(self._tokenizer, output.token_id, output.logprob),
                    "top_logprobs": [_token(self._tokenizer, *top) for top in output.top_logprobs],
                }
                for output in outputs
                if output.token_id is not None and output.logprob is not None
            ],
        }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": json_number(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}
