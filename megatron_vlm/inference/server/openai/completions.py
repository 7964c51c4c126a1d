"""`POST /v1/completions`: text or token ids that the model continues, without its chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.inference.request import AnyPrompt, TextPrompt, TokenLogprob, TokenOutput, TokenPrompt
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import ApiError
from megatron_vlm.inference.server.generation import Generation
from megatron_vlm.inference.server.merge_streams import merge
from megatron_vlm.inference.server.openai.common import (
    event_stream,
    json_number,
    new_id,
    sampling_params,
    token_text,
    usage,
)
from megatron_vlm.inference.server.openai.schema import CompletionRequest

Token = tuple[int, float | None, Sequence[tuple[int, float]]]
"""(id, log-probability, most likely tokens)"""
_DEFAULT_MAX_TOKENS = 16
"""OpenAI's and Megatron-LM's default for this route."""
_MOST_REQUESTS = 128


def read_prompts(body: CompletionRequest) -> list[AnyPrompt]:
    """Raises ApiError (400) if a prompt is empty and does not begin with a token of its own."""
    prompt = body.prompt
    items: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    if body.add_BOS and not isinstance(items[0], str):
        raise ApiError(400, "add_BOS is for text: put the token in front of the token ids.", param="add_BOS")
    return [TextPrompt(item, add_bos=body.add_BOS) if isinstance(item, str) else TokenPrompt(item) for item in items]


def _check(body: CompletionRequest, num_prompts: int) -> None:
    count = body.n or 1
    if body.best_of not in (None, count):
        raise ApiError(
            400, f"best_of is {body.best_of}, but only the value of n, {count}, is supported.", param="best_of"
        )
    if num_prompts * count > _MOST_REQUESTS:
        raise ApiError(
            400, f"{num_prompts} prompts with {count} answers each: at most {_MOST_REQUESTS} answers in all."
        )
    if body.max_tokens == 0 and not (body.echo and body.logprobs is not None):
        raise ApiError(
            400, "max_tokens is 0: this needs echo = true and logprobs, to evaluate the prompt.", param="max_tokens"
        )
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "The prompt's logprobs cannot be streamed: leave out stream or echo.", param="stream")


def completions_router(backend: Backend) -> APIRouter:
    """The route, with and without /v1."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", response_model=None, summary="Continue a text")
    @router.post("/completions", response_model=None, include_in_schema=False)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        backend.check_model(body.model)
        prompts = read_prompts(body)
        _check(body, len(prompts))
        encoded, params = [], []
        for prompt in prompts:
            length = len(prompt.text) if isinstance(prompt, TextPrompt) else 0
            one = await backend.encode(lambda prompt=prompt: prompt, length)  # type: ignore[misc]
            for param in sampling_params(
                body,
                backend,
                one,
                max_tokens=_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs,
                prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            ):
                encoded.append(one)
                params.append(param)
        generation = Generation(backend, http, encoded, params)
        answer = _Answer(backend, generation, body, [_text(backend.engine.tokenizer, prompt) for prompt in prompts])
        if body.stream:
            return event_stream(answer.chunks(), generation)
        async with generation:
            return JSONResponse(await answer.whole())

    return router


def _text(tokenizer: Tokenizer, prompt: AnyPrompt) -> str:
    if isinstance(prompt, TokenPrompt):
        return tokenizer.decode([token for token in prompt.token_ids if token < len(tokenizer)])
    assert isinstance(prompt, TextPrompt)
    return prompt.text


class _Answer:
    """The answers to one request: `n` per prompt, whole or in chunks."""

    def __init__(self, backend: Backend, generation: Generation, body: CompletionRequest, prompts: list[str]) -> None:
        self._generation, self._tokenizer, self._body = generation, backend.engine.tokenizer, body
        self._prompts, self._count = prompts, body.n or 1
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": backend.settings.model_name,
        }

    def _echo(self, index: int) -> str:
        return self._prompts[index // self._count] if self._body.echo else ""

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        return usage(self._generation.handles[:: self._count], completion_tokens)

    async def whole(self) -> dict[str, Any]:
        answers = await self._generation.all_outputs()
        choices = []
        for index, (handle, outputs) in enumerate(zip(self._generation.handles, answers, strict=True)):
            tokens = [*_prompt_tokens(handle.prompt_token_ids, handle.prompt_logprobs), *_tokens(outputs)]
            choices.append(
                {
                    "index": index,
                    "text": self._echo(index) + "".join(output.text_delta for output in outputs),
                    "logprobs": None if self._body.logprobs is None else self._logprobs(tokens),
                    "finish_reason": outputs[-1].finish_reason,
                }
            )
        completion_tokens = sum(output.token_id is not None for outputs in answers for output in outputs)
        return {**self._head, "choices": choices, "usage": self._usage(completion_tokens)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        body, completion_tokens = self._body, 0
        if body.echo:
            for index in range(len(self._generation.handles)):
                yield self._chunk(index, self._echo(index))
        streams = [self._generation.outputs(index) for index in range(len(self._generation.handles))]
        offsets = [len(self._echo(index)) for index in range(len(streams))]
        async for index, output in merge(streams):
            completion_tokens += output.token_id is not None
            logprobs = None
            if body.logprobs is not None:
                logprobs = self._logprobs(_tokens([output]), offsets[index])
                offsets[index] += sum(map(len, logprobs["tokens"]))
            if output.text_delta or output.finish_reason or logprobs is not None:
                yield self._chunk(index, output.text_delta, logprobs, output.finish_reason)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage(completion_tokens)}

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
        """In the shape of OpenAI's text completions; offsets are those of the tokens' own texts."""
        texts = [token_text(self._tokenizer, token) for token, _, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        tops = [
            {token_text(self._tokenizer, other): json_number(value) for other, value in top} if top else None
            for _, _, top in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [None if logprob is None else json_number(logprob) for _, logprob, _ in tokens],
            "top_logprobs": tops if self._body.logprobs else None,
            "text_offset": offsets,
        }


def _tokens(outputs: Sequence[TokenOutput]) -> list[Token]:
    return [(output.token_id, output.logprob, output.top_logprobs) for output in outputs if output.token_id is not None]


def _prompt_tokens(ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None) -> list[Token]:
    """(id, log-probability, top tokens) of a prompt's tokens; nothing if they were not asked for."""
    return [
        (token, known.logprob if known else None, known.top if known else ())
        for token, known in zip(ids, logprobs or [], strict=False)
    ]
