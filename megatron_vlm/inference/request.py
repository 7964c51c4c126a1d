"""What a caller gives to the engine, and what it gets back: prompts, sampling parameters, handles, tokens."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from megatron_vlm.data.processing.conversation import Turn

FinishReason = Literal["stop", "length", "cancelled"]
"""stop: an end-of-sequence or stop token, or a stop word; length: max_new_tokens tokens; cancelled: Handle.cancel."""


@dataclass
class Prompt:
    """A conversation that ends with a question, and the images of its `<image>` placeholders, in order."""

    turns: Sequence[Turn]
    images: Sequence[Image.Image] = field(default_factory=list)


@dataclass
class AnsweredPrompt(Prompt):
    """A conversation that ends with an answer, to ask for the answer's log-probabilities; nothing follows it.

    The last tokens are those of the answer, and the end-of-sequence token.
    """


@dataclass
class TextPrompt:
    """Text that the model continues, without the chat template; each `<image>` in it stands for the next image."""

    text: str
    images: Sequence[Image.Image] = field(default_factory=list)
    add_bos: bool = False
    """Begin with the end-of-sequence id, which opens every conversation in training."""


@dataclass
class TokenPrompt:
    """Token ids that the model continues, without the chat template and without images."""

    token_ids: Sequence[int]


AnyPrompt = Prompt | TextPrompt | TokenPrompt


class EngineError(RuntimeError):
    """The engine stopped before the request was finished."""


class QueueFull(RuntimeError):
    """The engine's queue of waiting requests is full; `retry_after` is an estimate in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"Too many requests are waiting. Try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class PromptTooLong(ValueError):
    """Prompt and max_new_tokens together exceed the longest sequence, or the whole key/value cache."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Raises ValueError if a value is out of range.

    Logits are changed in transformers' order: repetition penalty, temperature, top-k, top-p.
    """

    max_new_tokens: int = 64
    """0 evaluates the prompt only, for its log-probabilities."""
    temperature: float = 0.0
    """0: greedy decoding."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities sum to at least top_p."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occurred, and multiplies the negative ones (arXiv:1909.05858)."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch; None: a random seed."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; it is no part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with one of these tokens."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""
    logprobs: int | None = None
    """Report each token's log-probability, and this number of most likely tokens; None: neither."""
    prompt_logprobs: bool = False
    """Report the log-probabilities of the prompt's tokens in Handle.prompt_logprobs."""

    def __post_init__(self) -> None:
        for name, minimum in (("max_new_tokens", 0), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {minimum}.")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}: it must be a number.")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}: it must be between 0 (greedy) and 100.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1.")
        if not 0.01 <= self.repetition_penalty <= 100:  # far beyond, logits would become infinite
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it must be between 0.01 and 100.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be at least 0 and below 2**63.")
        if isinstance(self.stop, str):
            raise ValueError(f"stop is the text {self.stop!r}: it must be a list of stop words.")
        if any(not isinstance(word, str) or not word for word in self.stop):
            raise ValueError("stop has an empty stop word: every stop word needs at least one character.")
        if self.logprobs is not None and not 0 <= self.logprobs <= 100:
            raise ValueError(f"logprobs is {self.logprobs}: it must be between 0 and 100.")
        if self.max_new_tokens == 0 and not self.prompt_logprobs:
            raise ValueError("max_new_tokens is 0: then only the prompt's log-probabilities can be asked for.")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities before repetition penalty, temperature, top-k and top-p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, most likely first."""


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. The last output of a request has a finish reason; texts concatenate to the answer."""

    token_id: int | None
    """None in a last output without a token: cancelled, or max_new_tokens was 0."""
    text_delta: str
    """Text that is certain now: it may be empty, or the text of several tokens."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


class Handle:
    """A submitted request. Iterating yields its tokens as they are generated, and ends with the request.

    One thread reads the outputs; any thread may call `cancel`.
    """

    def __init__(
        self, prompt_token_ids: list[int], wake: Callable[[], None], notify: Callable[[], None] | None = None
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        """Image tokens included."""
        self.cached_tokens = 0
        """Prompt tokens whose keys and values were found in the prefix cache; known before the first output."""
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        """One per prompt token, None for the first; set before the first output if they were asked for."""
        self.finish_reason: FinishReason | None = None
        """Set when the last output has been read."""
        self._outputs: queue.SimpleQueue[TokenOutput | EngineError] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._wake, self._notify = wake, notify

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens, image tokens included."""
        return len(self.prompt_token_ids)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the request as soon as possible; its last output has the finish reason `cancelled`."""
        self._cancelled.set()
        self._wake()

    def next_output(self, timeout: float | None = None) -> TokenOutput:
        """The next token; waits at most `timeout` seconds.

        Raises:
            queue.Empty: there was none in time.
            EngineError: the engine stopped before the request was finished.
        """
        output = self._outputs.get(timeout=timeout)
        if isinstance(output, EngineError):
            raise output
        self.finish_reason = output.finish_reason
        return output

    def __iter__(self) -> Iterator[TokenOutput]:
        while self.finish_reason is None:
            yield self.next_output()

    def put(self, output: TokenOutput | EngineError) -> None:
        """Called by the engine only."""
        self._outputs.put(output)
        if self._notify is not None:
            self._notify()


@dataclass(frozen=True)
class EngineStats:
    """State of an engine, and its counts since it started."""

    running: int
    """Requests in the running batch."""
    waiting: int
    total_blocks: int
    """Blocks of the key/value cache."""
    free_blocks: int
    """Blocks that no request uses, whether or not their content is kept for prefix caching."""
    prompt_tokens: int
    """Prompt tokens of the requests that were admitted."""
    cached_tokens: int
    """Those of them that were found in the prefix cache."""
    generated_tokens: int
    tokens_per_second: float
    """Generated tokens per second over the last 10 s."""
    finished: dict[str, int]
    """Finish reason -> number of requests."""
    prefill_seconds: float
    """Time of steps, split between prefill and decode by their tokens."""
    decode_seconds: float
