"""`/v1/chat/completions` with OpenAI's own client: the engine's answers, streamed or not, with images."""

from __future__ import annotations

import openai
import pytest

from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.request import Prompt, SamplingParams, TokenPrompt
from tests.checkpoint_convert.whole_model import SINGLE, TALL, WIDE, picture
from tests.inference.server.running import RunningServer, image_part

QUESTION = [{"type": "text", "text": "What is the colour?"}, image_part(picture(WIDE))]
PROMPT = Prompt([Turn("human", "<image>\nWhat is the colour?")], [picture(WIDE)])
GREEDY = SamplingParams(12, logprobs=3)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_an_answer_about_an_image_is_the_engines(server: RunningServer, client: openai.OpenAI) -> None:
    handle = server.engine.submit(PROMPT, GREEDY)
    expected = list(handle)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = answer.choices
    assert choice.message.content == "".join(output.text_delta for output in expected)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx([o.logprob for o in expected])
    for token, output in zip(choice.logprobs.content, expected, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([value for _, value in output.top_logprobs])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (handle.prompt_tokens, 12)


def test_a_stream_has_the_text_and_logprobs_of_the_whole_answer(client: openai.OpenAI) -> None:
    arguments = dict(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=12, temperature=0,
        logprobs=True,
    )  # fmt: skip
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    logprobs = [token.logprob for piece in pieces if piece.logprobs for token in piece.logprobs.content]
    assert logprobs == pytest.approx([token.logprob for token in whole.choices[0].logprobs.content])
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_turns_and_images(server: RunningServer) -> None:
    messages = [
        {"role": "user", "content": [image_part(picture(SINGLE, 3)), {"type": "text", "text": "A circle?"}]},
        {"role": "assistant", "content": "yes"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And now?"}, image_part(picture(TALL)), image_part(picture(WIDE))],
        },
    ]  # fmt: skip
    turns = [
        Turn("human", "<image>\nA circle?"),
        Turn("gpt", "yes"),
        Turn("human", "<image>\n<image>\nAnd now?"),
    ]
    expected = server.engine.answer([Prompt(turns, [picture(SINGLE, 3), picture(TALL), picture(WIDE)])], 8)
    assert server.chat(None, messages=messages)["choices"][0]["message"]["content"] == expected[0]


def test_seeds_make_sampled_answers_repeatable(server: RunningServer) -> None:
    def answers(seed: int) -> list[str]:
        found = server.chat("What?", temperature=1.0, seed=seed, n=3, max_tokens=12)
        assert found["usage"]["completion_tokens"] == 36
        return [choice["message"]["content"] for choice in found["choices"]]

    first = answers(5)
    assert answers(5) == first
    assert len(set(first)) == 3
    assert answers(6)[:2] == first[1:]


def test_n_answers_are_streamed_with_their_indices(server: RunningServer, client: openai.OpenAI) -> None:
    whole = server.chat("What?", temperature=1.0, seed=5, n=3, max_tokens=12)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What?"}], seed=5, n=3, max_tokens=12, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_a_stop_word_ends_the_answer_before_it(server: RunningServer) -> None:
    text = server.chat("What?", max_tokens=12)["choices"][0]["message"]["content"]
    stop = text[4:6]
    answer = server.chat("What?", max_tokens=12, stop=[stop, "never seen"])["choices"][0]
    assert answer["message"]["content"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_without_a_limit_the_default_is_taken_and_what_room_there_is(server: RunningServer) -> None:
    default = server.backend.settings.default_max_tokens
    answer = server.chat("What?", max_tokens=None, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == default
    ids = [5] * (server.engine.max_sequence_length - 10)
    assert server.engine.max_new_tokens(server.engine.encode(TokenPrompt(ids))) == 10


def test_routes_without_v1_and_unused_fields(server: RunningServer) -> None:
    body = {
        "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2, "frequency_penalty": 0, "logit_bias": {},
        "user": "somebody", "store": False, "metadata": {"a": "b"}, "response_format": {"type": "text"}, "tools": [],
    }  # fmt: skip
    assert server.client.post("/chat/completions", json=body).status_code == 200


def test_models(server: RunningServer, client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here, but 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "What?"}])
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")
