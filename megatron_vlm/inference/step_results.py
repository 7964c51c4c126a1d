"""From the logits of a step to the tokens that requests receive."""

from __future__ import annotations

import torch

from megatron_vlm.inference.request import FinishReason, TokenLogprob, TokenOutput
from megatron_vlm.inference.sampling import greedy, sample, token_logprobs
from megatron_vlm.inference.scheduler import Request, Step, StepPart


def next_tokens(step: Step, logits: torch.Tensor, eos_id: int) -> list[tuple[Request, TokenOutput]]:
    """Sample the next token of each request whose tokens are all computed, and append it to the request.

    Args:
        step: after Scheduler.complete.
        logits: [n, V] fp32, at the positions of `step.plan.logit_positions`.
        eos_id: ends a request unless it has ignore_eos.

    Returns:
        Outputs in the order of the step's parts. Prompt log-probabilities are written to the handles.
    """
    rows = logits.split([len(part.logit_positions) for part in step.parts])
    sampling = [(part, row) for part, row in zip(step.parts, rows, strict=True) if part.samples]
    for part, row in zip(step.parts, rows, strict=True):
        if part.request.params.prompt_logprobs and part.is_prefill:
            _add_prompt_logprobs(part, row)
    if not sampling:
        return []
    # Once for all requests: most are greedy.
    most_likely = greedy(torch.stack([row[-1] for _, row in sampling])).tolist()
    return [
        (part.request, _next_token(part.request, row[-1], token, eos_id))
        for (part, row), token in zip(sampling, most_likely, strict=True)
    ]


def _add_prompt_logprobs(part: StepPart, logits: torch.Tensor) -> None:
    """Logits at the part's positions are those of the prompt tokens after them; the last prompt token has none."""
    request = part.request
    assert request.handle.prompt_logprobs is not None
    first = request.computed - part.length + 1
    targets = request.prompt.ids[first : request.computed + 1]
    if targets:
        top = request.params.logprobs or 0
        request.handle.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, top)


def _next_token(request: Request, logits: torch.Tensor, most_likely: int, eos_id: int) -> TokenOutput:
    """The output for a request with logits [V], whose greatest is that of the token `most_likely`."""
    params = request.params
    if not params.max_new_tokens:
        return TokenOutput(None, "", finish_reason="length")
    token = most_likely
    if params.temperature or params.repetition_penalty != 1:
        token = sample(logits, params, request.ids, request.generator)
    request.ids.append(token)
    reported: TokenLogprob | None = None
    if params.logprobs is not None:
        (reported,) = token_logprobs(logits[None], [token], params.logprobs)
    text, reason = _text_and_reason(request, token, eos_id)
    if reported is None:
        return TokenOutput(token, text, finish_reason=reason)
    return TokenOutput(token, text, reported.logprob, reported.top, reason)


def _text_and_reason(request: Request, token: int, eos_id: int) -> tuple[str, FinishReason | None]:
    params, detokenizer = request.params, request.detokenizer
    if token in params.stop_token_ids or (token == eos_id and not params.ignore_eos):
        return detokenizer.finish(), "stop"
    text, stopped = detokenizer.add(token)
    if stopped:
        return text, "stop"
    if request.generated == params.max_new_tokens:
        return text + detokenizer.finish(), "length"
    return text, None
