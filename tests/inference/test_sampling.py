"""Sampling has the distribution of transformers' logits processors."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.inference.request import SamplingParams
from megatron_vlm.inference.sampling import sample, token_logprobs

PREVIOUS = [3, 3, 5, 0]
CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=1.5, top_k=4),
    "top-p": SamplingParams(temperature=1.0, top_p=0.6),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "all": SamplingParams(temperature=0.9, top_k=6, top_p=0.8, repetition_penalty=1.3),
}


def _probabilities_of_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    from transformers.generation import logits_process as processors

    ids, scores = torch.tensor([PREVIOUS]), logits[None]
    if params.repetition_penalty != 1:
        scores = processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = processors.TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = processors.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = processors.TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("params", CASES.values(), ids=list(CASES))
def test_the_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    expected = _probabilities_of_transformers(logits, params)
    generator, count = torch.Generator().manual_seed(0), 4000
    tokens = torch.tensor([sample(logits, params, PREVIOUS, generator) for _ in range(count)])
    measured = torch.bincount(tokens, minlength=12) / count
    assert not (measured[expected == 0] > 0).any()
    error = (expected * (1 - expected) / count).sqrt()
    assert ((measured - expected).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-10])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, SamplingParams(temperature=temperature), [], torch.Generator()) == 1


def test_greedy_with_a_repetition_penalty() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert sample(logits, SamplingParams(repetition_penalty=1.2), [0], torch.Generator()) == 0
    assert sample(logits, SamplingParams(repetition_penalty=1.5), [0], torch.Generator()) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0]


def test_the_lowest_temperature_is_greedy() -> None:
    logits = torch.tensor([200.0, -300.0, 201.0])
    for temperature in (1e-3, 1e-30, 1e-45):
        assert sample(logits, SamplingParams(temperature=temperature), [0], torch.Generator().manual_seed(0)) == 2


def test_log_probabilities() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    expected = logits.log_softmax(-1)
    for row, entry in enumerate(token_logprobs(logits, [6, 0, 3], 2)):
        assert entry.logprob == pytest.approx(float(expected[row, [6, 0, 3][row]]))
        assert [token for token, _ in entry.top] == expected[row].argsort(descending=True)[:2].tolist()
    assert token_logprobs(logits, [6, 0, 3], 0)[0].top == ()
    assert len(token_logprobs(logits, [6, 0, 3], 50)[0].top) == 7
