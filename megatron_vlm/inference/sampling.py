"""Choice of the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vlm.inference.request import SamplingParams, TokenLogprob

_LEAST_TEMPERATURE = 1e-20
"""Lower ones are greedy decoding: in fp32 the division by them could give 0 / 0."""


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Greedy decoding, logits [n, V] -> ids [n]; the lowest id if several are equally likely, as in transformers."""
    return logits.argmax(dim=-1)


def sample(
    logits: torch.Tensor, params: SamplingParams, previous_ids: Sequence[int], generator: torch.Generator
) -> int:
    """The next token of one request.

    Args:
        logits: [V] fp32.
        params: its sampling parameters.
        previous_ids: prompt and generated tokens, which the repetition penalty applies to.
        generator: the request's own random state, on the CPU; not used in greedy decoding.
    """
    if params.repetition_penalty != 1:
        logits = logits.clone()
        occurred = torch.tensor(sorted(set(previous_ids)), device=logits.device)
        scores = logits[occurred]
        penalty = params.repetition_penalty
        logits[occurred] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if params.temperature < _LEAST_TEMPERATURE:
        return int(logits.argmax())
    # Below the greatest logit, so that a low temperature gives no infinity.
    scaled = (logits - logits.max()).cpu() / params.temperature
    values, ids = scaled.sort(descending=True, stable=True)
    if params.top_k:
        values, ids = values[: params.top_k], ids[: params.top_k]
    cumulative = values.double().softmax(0).cumsum(0)
    # The fewest tokens whose probabilities sum to at least top_p: those before which less than top_p was reached.
    kept = len(cumulative) if params.top_p == 1 else int((cumulative < params.top_p).sum()) + 1
    cumulative = cumulative[:kept]
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(ids[min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)])


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token per row, and of the `top` most likely ones; logits [n, V] fp32."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenLogprob(token, value) for token, value in zip(token_ids, chosen, strict=True)]
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, ids, values in zip(
            token_ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
