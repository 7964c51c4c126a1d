"""`PUT /api`: requests and answers as of Megatron-LM's server and client."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.inference.request import SamplingParams, TextPrompt
from tests.inference.server.running import RunningServer


def test_a_request_of_megatrons_client(server: RunningServer) -> None:
    """The client of Megatron-LM sends these two fields, and prints text[0]."""
    response = server.client.put("/api", json={"prompts": ["A red dog."], "tokens_to_generate": 5})
    assert response.status_code == 200
    assert response.json()["text"][0].startswith("A red dog.")


def test_text_segments_tokens_and_logprobs(server: RunningServer) -> None:
    prompts = ["A red dog.", "blue"]
    fields = {"prompts": prompts, "tokens_to_generate": 5, "top_k": 1, "logprobs": True}
    answer = server.client.put("/api", json=fields).json()
    for index, text in enumerate(prompts):
        handle = server.engine.submit(TextPrompt(text), SamplingParams(5, logprobs=0, prompt_logprobs=True))
        outputs = list(handle)
        ids = [*handle.prompt_token_ids, *(output.token_id for output in outputs)]
        assert answer["text"][index] == text + "".join(output.text_delta for output in outputs)
        assert answer["tokens"][index] == ids
        assert len(answer["segments"][index]) == len(ids)
        assert handle.prompt_logprobs is not None
        expected = [known.logprob for known in handle.prompt_logprobs[1:]] + [output.logprob for output in outputs]
        assert answer["logprobs"][index] == pytest.approx(expected)


def test_options(server: RunningServer) -> None:
    def text(**fields: Any) -> str:
        response = server.client.put("/api", json={"prompts": ["A red dog."], "tokens_to_generate": 8} | fields)
        assert response.status_code == 200, response.text
        return str(response.json()["text"][0])

    assert text(random_seed=3, temperature=2.0) == text(random_seed=3, temperature=2.0)
    assert text(random_seed=3) != text(random_seed=4)
    assert text(random_seed=3, top_p=1) == text(random_seed=3)
    assert "\n" not in text(stop_on_eol=True, random_seed=1)
    assert text(add_BOS=True, top_k=1) != text(top_k=1)
    first = server.client.put("/api", json={"prompts": ["blue"], "tokens_to_generate": 2, "top_k": 1}).json()
    token = first["tokens"][0][-1]
    stopped = server.client.put(
        "/api", json={"prompts": ["blue"], "tokens_to_generate": 8, "top_k": 1, "stop_token": token}
    ).json()
    assert stopped["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompts: this field is required"),
        ({"prompts": "a"}, "prompts: Input should be a valid list"),
        ({"prompts": []}, "prompts: List should have at least 1 item"),
        ({"prompts": ["a"] * 129}, "prompts: List should have at most 128 items"),
        ({"prompts": [""]}, "an empty prompt needs add_BOS = true"),
        ({"prompts": ["a"], "tokens_to_generate": -1}, "tokens_to_generate: Input should be greater"),
        ({"prompts": ["a"], "tokens_to_generate": 0}, "tokens_to_generate = 0 needs logprobs = true"),
        ({"prompts": ["a"], "temperature": 0}, "temperature: Input should be greater than 0"),
        ({"prompts": ["a"], "temperature": 101}, "temperature: Input should be less than or equal to 100"),
        ({"prompts": ["a"], "top_k": 1001}, "top_k: Input should be less"),
        ({"prompts": ["a"], "top_k": 3, "top_p": 0.5}, "top_k and top_p cannot both be set"),
        ({"prompts": ["a"], "max_len": 3}, "the field is tokens_to_generate"),
        ({"prompts": ["a"], "sentences": ["a"]}, "the field is prompts"),
        ({"prompts": ["a"], "beam_width": 3}, "beam search is not supported"),
        ({"prompts": ["a"], "stop_token": 10**6}, "no token id of the model"),
        ({"prompts": ["a"], "random_seed": -1}, "random_seed: Input should be greater"),
        ({"prompts": ["a"], "prevent_newline_after_colon": True}, "prevent_newline_after_colon is not supported"),
        ({"prompts": ["a"], "add_BOS": 1}, "add_BOS: Input should be a valid boolean"),
        ({"prompts": ["a"], "tokens_to_generate": 10**6}, "a sequence has at most"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_message(server: RunningServer, fields: dict[str, Any], message: str) -> None:
    response = server.client.put("/api", json=fields)
    assert response.status_code == 400
    assert message in response.json()["message"]
