"""Requests that join and leave a running batch: their tokens, log-probabilities, texts and blocks."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_vlm.config import InferenceConfig
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.engine import Engine, read_prompts
from megatron_vlm.inference.load import load_engine
from megatron_vlm.inference.request import (
    EngineError,
    Handle,
    Prompt,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    TextPrompt,
    TokenOutput,
    TokenPrompt,
)
from tests.checkpoint_convert.whole_model import SINGLE, picture
from tests.inference.tiny_model import random_specs, write_tiny_model

CONFIG = InferenceConfig(
    inference_max_requests=8,
    inference_dynamic_batching_max_tokens=64,
    inference_dynamic_batching_block_size=8,
    max_queued_requests=40,
    max_cached_images=2,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("batching")
    write_tiny_model(folder)
    with load_engine(folder / "megatron", CONFIG) as engine:
        assert engine is not None
        yield engine


def _outputs(handle: Handle) -> list[TokenOutput]:
    return list(handle)


def _wait_until_idle(engine: Engine) -> None:
    for _ in range(1000):
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            return
        time.sleep(0.01)
    raise AssertionError(f"still busy: {stats}")


def test_answers_do_not_depend_on_the_other_requests(engine: Engine) -> None:
    """Greedy and sampled, alone and in a random crowd, where other chunks and cached blocks are used."""
    prompts = [spec.prompt() for spec in random_specs(14, 90)]
    params = [
        SamplingParams(12, temperature=0.8 * (n % 3 == 2), seed=n, logprobs=2, ignore_eos=True) for n in range(14)
    ]
    alone = [_outputs(engine.submit(prompt, param)) for prompt, param in zip(prompts, params, strict=True)]
    handles = []
    for number in random.Random(0).sample(range(14), 14):
        handles.append((number, engine.submit(prompts[number], params[number])))
        time.sleep(0.002)
    for number, handle in handles:
        outputs = _outputs(handle)
        assert [output.token_id for output in outputs] == [output.token_id for output in alone[number]]
        logprobs = [[output.logprob for output in answer] for answer in (outputs, alone[number])]
        assert logprobs[0] == pytest.approx(logprobs[1], rel=0, abs=1e-5)


def test_decode_is_bitwise_independent_of_the_other_requests(engine: Engine) -> None:
    """Prompts of one token have no chunks, so only the number of requests in a step differs: 2 to 8."""
    params = SamplingParams(20, logprobs=5, ignore_eos=True)

    def answers(tokens: list[int]) -> dict[int, list[TokenOutput]]:
        with engine._condition:  # so that no request starts before the others
            handles = {token: engine.submit(TokenPrompt([token]), params) for token in tokens}
        return {token: _outputs(handle) for token, handle in handles.items()}

    together = answers(list(range(8)))
    for size in (2, 4, 6):
        for token, outputs in answers(list(range(size))).items():
            assert outputs == together[token]


@torch.no_grad()
def test_log_probabilities_are_those_of_a_forward_pass(engine: Engine) -> None:
    prompt = random_specs(4, 70)[2].prompt()
    handle = engine.submit(prompt, SamplingParams(6, logprobs=3, prompt_logprobs=True, ignore_eos=True))
    outputs = _outputs(handle)
    ids = handle.prompt_token_ids + [output.token_id or 0 for output in outputs]
    batch = read_prompts([prompt], engine.recipe.model, engine.recipe.data.image_aspect_ratio, engine.tokenizer)
    batch.tokens = torch.tensor(ids)
    batch.positions, batch.cu_seqlens = torch.arange(len(ids)), [0, len(ids)]
    model = engine.model
    hidden = model.language_model.decode(model.embed(batch), model.packed_sequence(batch))
    expected = model.language_model.logits(hidden, torch.arange(len(ids))).log_softmax(-1)
    chosen = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert handle.prompt_logprobs is not None
    assert handle.prompt_logprobs[0] is None
    reported = [entry.logprob for entry in handle.prompt_logprobs if entry is not None]
    reported += [output.logprob or 0.0 for output in outputs]
    torch.testing.assert_close(torch.tensor(reported), chosen, rtol=0, atol=1e-5)
    for row, output in enumerate(outputs, start=handle.prompt_tokens - 1):
        assert [token for token, _ in output.top_logprobs] == expected[row].topk(3).indices.tolist()


def test_the_prompt_alone_is_evaluated(engine: Engine) -> None:
    handle = engine.submit(TextPrompt("A red dog."), SamplingParams(0, prompt_logprobs=True))
    assert _outputs(handle) == [TokenOutput(None, "", finish_reason="length")]
    assert handle.prompt_logprobs is not None
    assert len(handle.prompt_logprobs) == handle.prompt_tokens > 5


def test_equal_beginnings_are_computed_once(engine: Engine) -> None:
    def ask(seed: int) -> tuple[Handle, list[float | None]]:
        prompt = Prompt([Turn("human", "<image>\nIs there a dog in it? yes, no")], [picture(SINGLE, seed)])
        handle = engine.submit(prompt, SamplingParams(6, ignore_eos=True, logprobs=0))
        return handle, [output.logprob for output in handle]

    first, logprobs = ask(50)
    assert first.cached_tokens <= 8, "only the chat template's first block is known"
    again, same = ask(50)
    assert same == pytest.approx(logprobs, rel=0, abs=1e-5)
    assert again.cached_tokens == (again.prompt_tokens - 1) // 8 * 8
    other, different = ask(51)
    assert other.cached_tokens <= 8, "an image of the same size with other pixels"
    assert different != pytest.approx(logprobs, rel=0, abs=1e-3)


def test_stop_words_and_ids_end_an_answer(engine: Engine) -> None:
    prompt = TextPrompt("A blue dog. What is", add_bos=True)
    outputs = _outputs(engine.submit(prompt, SamplingParams(24, ignore_eos=True)))
    text = "".join(output.text_delta for output in outputs)
    assert [output.finish_reason for output in outputs] == [None] * 23 + ["length"]
    word = text[9:12]
    stopped = _outputs(engine.submit(prompt, SamplingParams(24, ignore_eos=True, stop=("never", word))))
    assert "".join(output.text_delta for output in stopped) == text[: text.find(word)]
    assert stopped[-1].finish_reason == "stop"
    token = outputs[7].token_id
    assert token is not None
    first = [output.token_id for output in outputs].index(token)
    ended = _outputs(engine.submit(prompt, SamplingParams(24, ignore_eos=True, stop_token_ids=(token,))))
    assert [output.token_id for output in ended] == [output.token_id for output in outputs[: first + 1]]
    assert ended[-1].finish_reason == "stop"


def test_the_same_seed_gives_the_same_tokens(engine: Engine) -> None:
    def tokens(seed: int | None) -> list[int | None]:
        params = SamplingParams(10, temperature=1.2, top_p=0.95, seed=seed, ignore_eos=True)
        return [output.token_id for output in engine.submit(TextPrompt("A dog"), params)]

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in (1, 2, 3, None, None)}) == 5


def test_token_prompts_give_the_tokens_of_their_text(engine: Engine) -> None:
    text = "Is there a dog"
    params = SamplingParams(8, ignore_eos=True)
    from_text = [output.token_id for output in engine.submit(TextPrompt(text), params)]
    from_ids = [output.token_id for output in engine.submit(TokenPrompt(engine.tokenizer.encode(text)), params)]
    assert from_text == from_ids


def test_wrong_requests_are_rejected_and_leave_nothing_behind(engine: Engine) -> None:
    image_id = engine.recipe.model.image_token_index
    for prompt, message in (
        (TextPrompt(""), "The prompt is empty"),
        (TextPrompt("<image> a"), "1 <image> placeholders for 0 images"),
        (TokenPrompt([]), "The prompt has no tokens."),
        (TokenPrompt([1, 284]), r"Token id 284 of the prompt is not in 0\.\.283\."),
        (TokenPrompt([1, image_id]), "stands for an image"),
        (Prompt([Turn("gpt", "yes")]), "must end with human"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, SamplingParams(4))
    with pytest.raises(PromptTooLong, match="4100 in all, but a sequence has at most 4096"):
        engine.submit(TokenPrompt([1] * 4090), SamplingParams(10))
    with pytest.raises(ValueError, match="stop_token_ids has 284"):
        engine.submit(TokenPrompt([1]), SamplingParams(4, stop_token_ids=(284,)))
    _wait_until_idle(engine)
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_cancelled_requests_and_a_full_queue_leak_no_block(engine: Engine) -> None:
    chance = random.Random(1)
    prompts = [spec.prompt() for spec in random_specs(24, 60)]
    finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def client(number: int) -> None:
        handle = engine.submit(prompts[number], SamplingParams(20, ignore_eos=True))
        if number % 3 == 0:
            time.sleep(0.01 * (number % 5))
            handle.cancel()
        _outputs(handle)
        finished.put(handle.finish_reason)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
        time.sleep(chance.random() * 0.01)
    for thread in threads:
        thread.join(timeout=60)
    reasons = [finished.get(timeout=0) for _ in threads]
    assert reasons.count("length") >= 16
    assert set(reasons) <= {"length", "cancelled"}
    _wait_until_idle(engine)
    assert engine.stats().free_blocks == engine.stats().total_blocks
    handles = []
    with pytest.raises(QueueFull, match="Try again in") as caught:
        for _ in range(200):
            handles.append(engine.submit(TextPrompt("A dog"), SamplingParams(60, ignore_eos=True)))
    assert caught.value.retry_after >= 1
    for handle in handles:
        handle.cancel()
    assert all(_outputs(handle)[-1].finish_reason == "cancelled" for handle in handles)
    _wait_until_idle(engine)
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_a_cache_for_one_request_at_a_time_serves_all(engine: Engine) -> None:
    """The smallest cache that holds each request: they wait for each other's blocks."""
    block_bytes = 2 * 4 * 2 * 8 * 8 * 4  # keys and values, layers, kv heads, head width, tokens, fp32
    config = InferenceConfig(
        inference_max_requests=4,
        inference_dynamic_batching_max_tokens=16,
        inference_dynamic_batching_block_size=8,
        inference_dynamic_batching_buffer_size_gb=20.5 * block_bytes / 2**30,
    )
    prompts = [TokenPrompt([3 + number, *range(4, 40 + number)]) for number in range(9)]
    expected = engine.generate(prompts, 16)
    with Engine(engine.model, engine.tokenizer, config) as small:
        assert small.stats().total_blocks == 19
        assert small.generate(prompts, 16) == expected
        with pytest.raises(PromptTooLong, match="the key/value cache holds 152"):
            small.submit(TokenPrompt([1] * 150), SamplingParams(3))
        assert small.stats().free_blocks == 19


def test_a_thread_that_starts_an_engine_keeps_no_openmp_threads(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more of them than cores, GNU's runtime makes those of the engine's thread wait for the operating system."""
    released: list[int] = []
    monkeypatch.setattr("megatron_vlm.inference.engine.release_threads", lambda: released.append(threading.get_ident()))
    Engine(engine.model, engine.tokenizer, CONFIG).close()
    assert released == [threading.get_ident()]


def test_closing_cancels_or_finishes_requests(engine: Engine) -> None:
    for drain, reason in ((True, "length"), (False, "cancelled")):
        other = Engine(engine.model, engine.tokenizer, CONFIG)
        handle = other.submit(TextPrompt("A dog"), SamplingParams(40, ignore_eos=True))
        other.close(drain)
        assert _outputs(handle)[-1].finish_reason == reason
        with pytest.raises(EngineError, match=r"The engine is closed\."):
            other.submit(TextPrompt("A dog"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_loop_reaches_everybody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Engine(engine.model, engine.tokenizer, CONFIG)

    def fail(plan: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(other._runner, "run", fail)
    with pytest.raises(EngineError, match="The engine has failed: out of memory"):
        _outputs(other.submit(TextPrompt("A dog")))
    with pytest.raises(EngineError, match="out of memory"):
        other.submit(TextPrompt("A dog"))
    other.close()
