"""What chat and text completions share: sampling parameters, usage, identifiers, server-sent events."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.inference.prompts import EncodedPrompt
from megatron_vlm.inference.request import Handle, SamplingParams
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import ApiError, api_error
from megatron_vlm.inference.server.generation import Generation
from megatron_vlm.inference.server.openai.schema import GenerationRequest

_LEAST_LOGPROB = -9999.0


def sampling_params(
    request: GenerationRequest,
    backend: Backend,
    prompt: EncodedPrompt,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> list[SamplingParams]:
    """One for each of the `n` answers to a prompt; the k-th has the k-th seed after the request's.

    Raises:
        ApiError: the prompt is too long, or values do not go together.
    """
    room = backend.engine.max_new_tokens(prompt)
    if max_tokens is None:
        max_tokens = max(1, min(backend.settings.default_max_tokens, room))
    stop = request.stop if isinstance(request.stop, list) else [request.stop] if request.stop else []
    count = request.n or 1
    if count > 1 and request.temperature == 0:
        raise ApiError(400, "n is more than 1 and temperature is 0: all answers would be the same.", param="n")
    try:
        return [
            SamplingParams(
                max_new_tokens=max_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_k=max(0, request.top_k or 0),
                top_p=1.0 if request.top_p is None else request.top_p,
                repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
                seed=None if request.seed is None else (request.seed + number) % 2**63,
                stop=tuple(stop),
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=bool(request.ignore_eos),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for number in range(count)
        ]
    except ValueError as error:
        raise api_error(error) from error


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompts: Sequence[Handle], completion_tokens: int) -> dict[str, Any]:
    """Numbers of tokens; `prompts` has one handle per prompt, however many answers it gets."""
    prompt_tokens = sum(handle.prompt_tokens for handle in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(handle.cached_tokens for handle in prompts)},
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; U+FFFD where it is not whole characters."""
    return tokenizer.decode([token], skip_special_tokens=False) if token < len(tokenizer) else ""


def json_number(logprob: float) -> float:
    """A log-probability that JSON can hold, which has no infinity; the least one is vLLM's."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def event_stream(events: AsyncIterator[dict[str, Any]], generation: Generation) -> StreamingResponse:
    """Server-sent events, one per object, and `[DONE]` at the end; an error on the way is an event too."""

    async def blocks() -> AsyncIterator[str]:
        async with generation:
            try:
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            except ApiError as error:
                yield f"data: {json.dumps(error.as_openai())}\n\n"
            yield "data: [DONE]\n\n"

    return StreamingResponse(blocks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
