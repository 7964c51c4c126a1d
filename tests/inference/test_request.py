"""Sampling parameters check themselves."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.config import ConfigError, InferenceConfig, check_inference
from megatron_vlm.inference.request import SamplingParams


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1: it must be a whole number of at least 0."),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5: it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: then only the prompt's log-probabilities can be asked for."),
        ({"temperature": float("nan")}, "temperature is nan: it must be a number."),
        ({"temperature": -0.1}, "temperature is -0.1: it must be between 0 .greedy. and 100."),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number."),
        ({"top_k": True}, "top_k is True: it must be a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1."),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be between 0.01 and 100."),
        ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324: it must be between"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"stop": "end"}, "stop is the text 'end': it must be a list of stop words."),
        ({"stop": ("",)}, "stop has an empty stop word"),
        ({"logprobs": 101}, "logprobs is 101: it must be between 0 and 100."),
    ],
)
def test_wrong_parameters_are_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


def test_the_prompt_alone_can_be_evaluated() -> None:
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=True).max_new_tokens == 0


def test_wrong_settings_are_listed_together() -> None:
    wrong = InferenceConfig(inference_dynamic_batching_block_size=0, max_cached_images=-1)
    wrong.inference_max_requests, wrong.inference_dynamic_batching_max_tokens = 600, 512
    wrong.inference_dynamic_batching_buffer_size_gb = -1
    with pytest.raises(ConfigError) as caught:
        check_inference(wrong)
    problems = caught.value.problems
    assert [problem.split(" = ")[0] for problem in problems] == [
        "inference_dynamic_batching_block_size",
        "inference_dynamic_batching_buffer_size_gb",
        "max_cached_images",
        "inference_dynamic_batching_max_tokens",
    ]
    check_inference(InferenceConfig())
