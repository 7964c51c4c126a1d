"""Text generation from a Megatron checkpoint, without conversion to Hugging Face.

    submit (any thread) -> queue -> scheduler -> step plan -> all ranks -> logits -> sampling -> handles

One thread runs the loop: it admits requests, runs a step, and gives each request of the step its next token.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (prepares the process before megatron.core is imported)
from megatron_vlm.config import InferenceConfig, check_inference
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.inference.block_allocator import BlockAllocator
from megatron_vlm.inference.counters import EngineCounters
from megatron_vlm.inference.detokenizer import Detokenizer
from megatron_vlm.inference.prompts import EncodedPrompt, encode
from megatron_vlm.inference.prompts import read_prompts as read_prompts
from megatron_vlm.inference.ranks import PlanChannel, is_lost_rank, prepare_rank
from megatron_vlm.inference.request import (
    AnyPrompt,
    EngineError,
    EngineStats,
    Handle,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    TokenOutput,
)
from megatron_vlm.inference.request import Prompt as Prompt
from megatron_vlm.inference.scheduler import Request, Scheduler, Step
from megatron_vlm.inference.sizes import max_sequence_length, tokens_per_step
from megatron_vlm.inference.step_results import next_tokens
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.openmp import release_threads


class Engine:
    """Generates answers on one rank of each copy of the model; the others run `serve_rank`. Close it, or use `with`."""

    def __init__(
        self,
        model: VisionLanguageModel | Sequence[VisionLanguageModel],
        tokenizer: Tokenizer,
        config: InferenceConfig | None = None,
        channel: PlanChannel | None = None,
        only_inference: bool = False,
    ) -> None:
        """Start the engine's thread. Process groups must exist (runtime.launch).

        Args:
            model: this rank's stage, or its model chunks.
            tokenizer: the model's.
            config: sizes of the engine.
            channel: of an earlier engine on these ranks; default: a new one.
            only_inference: no model is trained in these process groups; steps are faster then. The same on all ranks.

        Raises:
            ConfigError: wrong settings.
        """
        self.config = replace(config or InferenceConfig())
        check_inference(self.config)
        self.config.inference_dynamic_batching_max_tokens = tokens_per_step(self.config)
        chunks = [model] if isinstance(model, VisionLanguageModel) else list(model)
        self.model, self.tokenizer, self.recipe = chunks[0], tokenizer, chunks[0].recipe
        self._channel, self._runner, num_blocks = prepare_rank(chunks, self.config, channel, only_inference)
        parallel = self.recipe.parallel
        slices = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        self._scheduler = Scheduler(self.config, BlockAllocator(num_blocks), slices)
        self._geometry = ImageGeometry.of(
            self.recipe.model, self.recipe.data.image_aspect_ratio, self.recipe.data.multi_image_aspect_ratio
        )
        self.max_sequence_length = max_sequence_length(self.recipe, self.config)
        """Prompt and generated tokens of a request at most."""
        self._condition = threading.Condition()
        self._incoming: deque[Request] = deque()
        self._closing, self._drain = False, True
        self._failure: BaseException | None = None
        self._counters = EngineCounters()
        release_threads()  # this thread has loaded the model; the engine's computes from now on
        self._thread = threading.Thread(target=self._loop, name="generation engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    # ---- called from any thread ----

    def encode(self, prompt: AnyPrompt) -> EncodedPrompt:
        """Token ids and tiles of a prompt, to be submitted once or several times.

        Raises:
            ValueError: the prompt is invalid (see prompts.encode).
        """
        return encode(prompt, self.tokenizer, self._geometry, self.recipe.model)

    def submit(
        self,
        prompt: AnyPrompt | EncodedPrompt,
        params: SamplingParams | None = None,
        notify: Callable[[], None] | None = None,
    ) -> Handle:
        """Queue a request. Its prompt is encoded, and its images are tiled, in the calling thread.

        Args:
            prompt: a prompt, encoded or not.
            params: greedy decoding of a few tokens by default.
            notify: called by the engine's thread after each output; it must return at once and never raise.

        Raises:
            ValueError: the prompt is invalid (see prompts.encode).
            PromptTooLong: prompt and new tokens exceed the longest sequence or the cache.
            QueueFull: too many requests are waiting.
            EngineError: the engine is closed.
        """
        self._check_open()
        encoded = prompt if isinstance(prompt, EncodedPrompt) else self.encode(prompt)
        return self._submit(encoded, params or SamplingParams(), notify)

    def max_new_tokens(self, prompt: EncodedPrompt) -> int:
        """New tokens that can follow a prompt at most; below 1 if the prompt is too long."""
        return self._limit() - len(prompt.ids)

    @property
    def failure(self) -> EngineError | None:
        """Set if an error ended the engine's thread, which is the cause; no request is answered after it."""
        return None if self._failure is None else self._failed(self._failure)

    def generate(self, prompts: Sequence[AnyPrompt], max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding.

        Args:
            prompts: each answer is the same as for the prompt alone.
            max_new_tokens: generation stops here if no end-of-sequence token came before.

        Returns:
            New token ids of each prompt, including the end-of-sequence id if there is one.

        Raises:
            ValueError: a prompt does not end with a question, or has not as many placeholders as images.
            PromptTooLong, EngineError: as in `submit`.
        """
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        encoded = []
        for number, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt))
                self._check_length(encoded[-1], max_new_tokens)
            except ValueError as error:
                raise type(error)(f"prompt {number}: {error}") from error
        params = SamplingParams(max_new_tokens)
        answers: list[list[int]] = []
        handles: deque[Handle] = deque()
        for prompt_ids in encoded:
            while True:
                try:
                    handles.append(self._submit(prompt_ids, params))
                    break
                except QueueFull:
                    if not handles:  # other callers fill the queue
                        time.sleep(0.05)
                    else:
                        answers.append(_token_ids(handles.popleft()))
        return answers + [_token_ids(handle) for handle in handles]

    def answer(self, prompts: Sequence[AnyPrompt], max_new_tokens: int) -> list[str]:
        """The text of each answer, without special tokens; arguments and errors as in `generate`."""
        return [self.tokenizer.decode(ids) for ids in self.generate(prompts, max_new_tokens)]

    def stats(self) -> EngineStats:
        """State and counts, for metrics."""
        allocator, counters = self._scheduler.allocator, self._counters
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._num_waiting(),
            total_blocks=allocator.total,
            free_blocks=allocator.free,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            tokens_per_second=counters.tokens_per_second(),
            finished=dict(counters.finished),
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
        )

    def close(self, drain: bool = True) -> None:
        """Reject new requests and stop, after all requests are finished (`drain`) or at once (they are cancelled)."""
        with self._condition:
            self._closing, self._drain = True, self._drain and drain
            self._condition.notify_all()
        self._thread.join()

    # ---- submission ----

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failed(self._failure)
        if self._closing:
            raise EngineError("The engine is closed.")

    def _check_length(self, prompt: EncodedPrompt, max_new_tokens: int) -> None:
        total, limit = len(prompt.ids) + max_new_tokens, self._limit()
        if total > limit:
            what = "a sequence has at most" if limit == self.max_sequence_length else "the key/value cache holds"
            raise PromptTooLong(
                f"The prompt has {len(prompt.ids)} tokens (image tokens included) and max_new_tokens is "
                f"{max_new_tokens}: {total} in all, but {what} {limit}."
            )

    def _limit(self) -> int:
        """Prompt and new tokens that both the model and the cache have room for."""
        return min(self.max_sequence_length, self._scheduler.allocator.total * self._scheduler.block_size)

    def _submit(
        self, prompt: EncodedPrompt, params: SamplingParams, notify: Callable[[], None] | None = None
    ) -> Handle:
        self._check_length(prompt, params.max_new_tokens)
        for token in params.stop_token_ids:
            if not 0 <= token < self.recipe.model.language.vocab_size:
                raise ValueError(f"stop_token_ids has {token}, which is no token id of the model.")
        handle = Handle(prompt.ids, self._wake, notify)
        request = Request(
            handle=handle,
            params=params,
            prompt=prompt,
            detokenizer=Detokenizer(self.tokenizer, params.stop, prompt.context),
            generator=torch.Generator().manual_seed(random.getrandbits(62) if params.seed is None else params.seed),
            ids=list(prompt.ids),
            submitted=time.monotonic(),
        )
        if params.prompt_logprobs:
            handle.prompt_logprobs = [None]
        with self._condition:
            self._check_open()
            waiting = self._num_waiting()
            if waiting >= self.config.max_queued_requests:
                raise QueueFull(max(1.0, self._counters.request_seconds * waiting / self.config.inference_max_requests))
            self._incoming.append(request)
            self._condition.notify_all()
        return handle

    def _num_waiting(self) -> int:
        return len(self._incoming) + len(self._scheduler.waiting)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    # ---- the engine's thread ----

    def _loop(self) -> None:
        try:
            if on_gpu():
                torch.cuda.set_device(self._runner.device)
            while self._collect_requests():
                step = self._scheduler.next_step()
                if step is not None:
                    self._run(step)
            self._channel.broadcast(None)
        except BaseException as error:
            self._fail(error)

    def _collect_requests(self) -> bool:
        """Wait until there is work; False when the engine is closed and nothing is left to do."""
        with self._condition:
            while True:
                self._scheduler.waiting.extend(self._incoming)
                self._incoming.clear()
                for request in [*self._scheduler.running, *self._scheduler.waiting]:
                    if request.handle.cancelled or (self._closing and not self._drain):
                        self._put(request, TokenOutput(None, "", finish_reason="cancelled"))
                if self._scheduler.running or self._scheduler.waiting:
                    return True
                if self._closing:
                    return False
                self._condition.wait()

    def _run(self, step: Step) -> None:
        started = time.perf_counter()
        self._channel.broadcast(step.plan)
        logits = self._runner.run(step.plan)
        assert logits is not None  # the engine's rank has them
        for part in step.parts:
            if part.is_prefill and part.request.computed == part.request.handle.cached_tokens:
                self._counters.add_admitted(part.request)
        self._scheduler.complete(step)
        outputs = next_tokens(step, logits, self.tokenizer.eos_id)
        self._counters.add_step(step, outputs, time.perf_counter() - started)
        for request, output in outputs:
            self._put(request, output)

    def _put(self, request: Request, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self._scheduler.remove(request)
            self._counters.add_finished(request, output.finish_reason)
        request.handle.put(output)

    def _fail(self, error: BaseException) -> None:
        """Report an error of the loop to everybody who waits, and to those who come later."""
        with self._condition:
            self._failure = error
            for request in [*self._scheduler.running, *self._scheduler.waiting, *self._incoming]:
                request.handle.put(self._failed(error))

    def _failed(self, error: BaseException) -> EngineError:
        reason = "another rank of the model has ended or cannot be reached" if is_lost_rank(error) else str(error)
        failed = EngineError(f"The engine has failed: {reason}.")
        failed.__cause__ = error
        return failed


def _token_ids(handle: Handle) -> list[int]:
    return [output.token_id for output in handle if output.token_id is not None]


GenerationEngine = Engine
"""The engine's name before it served several requests at once."""
