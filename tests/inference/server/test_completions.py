"""`/v1/completions`: texts and token ids, echoed log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

from megatron_vlm.inference.request import SamplingParams, TextPrompt
from tests.inference.server.running import RunningServer


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = server.client.post("/v1/completions", json={"temperature": 0, "max_tokens": 6} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_all_forms_of_a_prompt_give_the_same_answer(server: RunningServer) -> None:
    text = "A red dog."
    ids = server.engine.tokenizer.encode(text)
    expected = "".join(output.text_delta for output in server.engine.submit(TextPrompt(text), SamplingParams(6)))
    for prompt, count in ((text, 1), ([text], 1), (ids, 1), ([ids, ids], 2)):
        answer = complete(server, prompt=prompt)
        assert [choice["text"] for choice in answer["choices"]] == [expected] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["prompt_tokens"] == count * len(ids)


def test_prompts_and_answers_keep_their_order(server: RunningServer) -> None:
    prompts = ["A red dog.", "blue", "What is it?"]
    alone = [complete(server, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in complete(server, prompt=prompts)["choices"]] == alone
    together = complete(server, prompt=prompts, n=2, temperature=1, seed=3)["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    assert together[2]["text"] == complete(server, prompt="blue", temperature=1, seed=3)["choices"][0]["text"]


@torch.no_grad()
def test_the_prompts_logprobs_are_those_of_the_model(server: RunningServer) -> None:
    """As evaluation harnesses ask for them."""
    text = "A red dog. What is the colour of this image?"
    choice = complete(server, prompt=text, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    handle = server.engine.submit(TextPrompt(text), SamplingParams(0, prompt_logprobs=True, logprobs=2))
    list(handle)
    assert handle.prompt_logprobs is not None
    assert choice["text"] == text and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    assert [
        text[offset:].startswith(token)
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    ]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx([known.logprob for known in handle.prompt_logprobs[1:]])
    assert len(logprobs["top_logprobs"][1]) == 2


def test_a_stream_has_the_text_of_the_whole_answer(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    arguments = dict(model="tiny", prompt=["A red dog.", "blue"], max_tokens=8, temperature=0, echo=True)
    whole = client.completions.create(**arguments)
    texts = ["", ""]
    for chunk in client.completions.create(**arguments, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("A red dog.")


def test_the_end_of_sequence_token_in_front(server: RunningServer) -> None:
    plain = complete(server, prompt="A red dog.")
    assert complete(server, prompt="A red dog.", add_BOS=True)["usage"]["prompt_tokens"] == (
        plain["usage"]["prompt_tokens"] + 1
    )
    assert complete(server, prompt="", add_BOS=True)["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]: List should have at least 1 item"),
        ({"prompt": [1, "a"]}, "prompt[1]: Input should be a valid integer"),
        ({"prompt": [99999]}, "Token id 99999 of the prompt is not in"),
        ({"prompt": [-1]}, "prompt[0]: Input should be greater than or equal to 0"),
        ({"prompt": {}}, "prompt: Input should be a valid string"),
        ({}, "prompt: this field is required"),
        ({"prompt": "a", "max_tokens": 0}, "this needs echo = true and logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of is 2, but only the value of n, 1, is supported"),
        ({"prompt": "a", "n": 2, "temperature": 0}, "all answers would be the same"),
        ({"prompt": ["a"] * 128, "n": 2}, "at most 128 answers"),
        ({"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids has 1000000"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty: this is not supported: leave it out"),
        ({"prompt": "a", "stream": True, "echo": True, "logprobs": 1}, "cannot be streamed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server: RunningServer, fields: dict[str, Any], message: str) -> None:
    response = server.client.post("/v1/completions", json=fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
