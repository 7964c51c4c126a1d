"""The model `instellavl` of lmms-eval, on the generation engine.

python -m lmms_eval --model instellavl --model_args pretrained=DIR --tasks TASK,...

DIR is a Megatron checkpoint or an exported folder. With several processes (accelerate launch, torchrun), each has a
copy of the model and answers its share of the questions.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from checkpoint_convert.engine import open_engine
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.evaluation.model_args import engine_config
from megatron_vlm.evaluation.prompts import num_tokens, prompt_from_messages, prompt_from_text, sampling_params
from megatron_vlm.inference.request import AnsweredPrompt, Handle, Prompt, SamplingParams
from megatron_vlm.runtime.device import current_device

_PREPARING_THREADS = 4
_RANK_TIMEOUT_MINUTES = 24 * 60
"""The first rank to have all its answers waits for the last."""


class InstellaVL(lmms):
    """lmms-eval's interface with texts. Tasks that score given answers need it (--force_simple)."""

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **model_args: Any
    ) -> None:
        """Load the model.

        Args:
            pretrained: folder of a Megatron checkpoint, or of an exported model.
            batch_size: answers that are generated at the same time; 1 and auto leave the choice to the engine.
            device: accepted if it is the kind of device that this process computes on.
            model_args: see model_args.engine_config.

        Raises:
            ValueError: an argument that the model does not have, or a value that it does not support.
            ConversionError, CheckpointError: there is no such model.
        """
        super().__init__()
        self.device = current_device()
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(
                f"device is {device}, but this process computes on {self.device.type}: on the GPU of its local rank if "
                "there is one. To compute on the CPU, hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        config = engine_config(model_args, batch_size)
        self._window = 4 * config.inference_max_requests
        config.max_queued_requests = max(config.max_queued_requests, self._window)
        self._open = ExitStack()
        engine = self._open.enter_context(open_engine(Path(pretrained), config, timeout_minutes=_RANK_TIMEOUT_MINUTES))
        assert engine is not None  # every rank has one without tensor and pipeline parallelism
        self.engine = engine
        self._longest = min(
            engine.max_sequence_length, engine.stats().total_blocks * config.inference_dynamic_batching_block_size
        )

    def clean(self) -> None:
        """Free the model. lmms-eval calls this after the last request."""
        self._open.close()
        super().clean()

    # ---- lmms-eval's requests ----

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer for each request."""
        started = perf_counter()

        def submit(request: Instance) -> Handle | None:
            prompt, params = self._prompt_and_params(request)
            room = self._longest - num_tokens(prompt, self.engine)
            if room < 1:
                self._warn_too_long(request, prompt)
                return None
            return self.engine.submit(prompt, replace(params, max_new_tokens=min(params.max_new_tokens, room)))

        def answer(request: Instance, handle: Handle | None) -> GenerationResult:
            if handle is None:
                return GenerationResult("", TokenCounts(output_tokens=0))
            outputs = list(handle)
            counts = TokenCounts(input_tokens=handle.prompt_tokens, output_tokens=len(outputs))
            return GenerationResult("".join(output.text_delta for output in outputs), counts)

        answers = list(self._in_order(requests, submit, answer))
        tokens, elapsed = sum(answer.token_counts.output_tokens for answer in answers), perf_counter() - started
        rank = {"rank": self.rank}
        log_metrics(
            total_gen_tokens=tokens, total_elapsed_time=elapsed, avg_speed=tokens / elapsed, additional_metrics=rank
        )
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Not supported: NotImplementedError."""
        raise NotImplementedError(f"{requests[0].task_name} asks in several rounds, which instellavl does not support")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """How likely given answers are.

        Returns:
            As the "text" of each result, because lmms-eval 0.7.3 makes a text of any bare tuple, (loss, greedy): the
            mean loss over the tokens of the answer and the end-of-sequence token after it, as of lmms-eval's own models
            (tasks choose the answer with the smallest); and whether greedy decoding gives exactly this answer.
        """
        params = SamplingParams(0, logprobs=1, prompt_logprobs=True)

        def submit(request: Instance) -> tuple[Handle | None, int]:
            prompt = self._answered_prompt(request)
            length = len(self.engine.tokenizer.encode(prompt.turns[-1].text.strip())) + 1
            if num_tokens(prompt, self.engine) > self._longest:
                self._warn_too_long(request, prompt)
                return None, length
            return self.engine.submit(prompt, params), length

        def loss(request: Instance, submitted: tuple[Handle | None, int]) -> GenerationResult:
            handle, length = submitted
            if handle is None:
                return GenerationResult((float("inf"), False))
            for _ in handle:
                pass
            assert handle.prompt_logprobs is not None
            tokens = [token for token in handle.prompt_logprobs[-length:] if token is not None]
            greedy = all(token.token_id == token.top[0][0] for token in tokens)
            return GenerationResult((-sum(token.logprob for token in tokens) / length, greedy))

        return list(self._in_order(requests, submit, loss))

    # ---- prompts ----

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _prompt_and_params(self, request: Instance) -> tuple[Prompt, SamplingParams]:
        context, settings, doc_to_visual, *where = request.args
        visuals = doc_to_visual(self._document(*where)) or []
        return prompt_from_text(context, visuals), sampling_params(settings)

    def _answered_prompt(self, request: Instance) -> AnsweredPrompt:
        """The arguments end after the answer where a task asks how likely it is without a question."""
        context, answer, *where = request.args
        visuals: Sequence[Any] = []
        if where:
            document = self._document(*where[1:])
            answer = answer(document) if callable(answer) else answer
            visuals = where[0](document) or []
        question = prompt_from_text(context, visuals)
        return AnsweredPrompt([*question.turns, Turn("gpt", answer)], question.images)

    def _warn_too_long(self, request: Instance, prompt: Prompt) -> None:
        logging.getLogger(__name__).warning(
            "%s, document %s: the prompt has %d tokens, and the model takes %d. It counts as not answered.",
            *(request.task_name, request.doc_id, num_tokens(prompt, self.engine), self._longest),
        )

    # ---- order ----

    def _in_order(
        self,
        requests: Sequence[Instance],
        submit: Callable[[Instance], Any],
        result: Callable[[Instance, Any], Any],
    ) -> Iterator[Any]:
        """The results of all requests, in order. Threads prepare and submit a window of them ahead."""
        waiting: deque[tuple[Instance, Future[Any]]] = deque()
        with (
            ThreadPoolExecutor(_PREPARING_THREADS) as threads,
            tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar,
        ):

            def next_result() -> Any:
                request, submitted = waiting.popleft()
                try:
                    found = result(request, submitted.result())
                except (ValueError, OSError) as error:
                    raise ValueError(f"{request.task_name}, document {request.doc_id}: {error}") from error
                bar.update()
                return found

            for request in requests:
                waiting.append((request, threads.submit(submit, request)))
                if len(waiting) == self._window:
                    yield next_result()
            while waiting:
                yield next_result()


class InstellaVLChat(InstellaVL):
    """lmms-eval's interface with messages, which it prefers."""

    is_simple = False

    def _prompt_and_params(self, request: Instance) -> tuple[Prompt, SamplingParams]:
        _, doc_to_messages, settings, *where = request.args
        return prompt_from_messages(doc_to_messages(self._document(*where))), sampling_params(settings)
