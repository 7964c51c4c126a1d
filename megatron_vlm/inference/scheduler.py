"""Continuous batching: which requests run, and which of their tokens the next step computes (Orca, OSDI 2022).

A step is one packed row: a token of every request in decode, and chunks of the prompts in prefill (chunked prefill,
arXiv:2308.16369). A request is admitted when blocks for its prompt and all of its new tokens are free. So no running
request ever waits for a block, and none has to be computed twice.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vlm.config.inference import InferenceConfig
from megatron_vlm.inference.block_allocator import BlockAllocator, block_hash
from megatron_vlm.inference.detokenizer import Detokenizer
from megatron_vlm.inference.prompts import EncodedPrompt, PromptImage
from megatron_vlm.inference.request import Handle, SamplingParams
from megatron_vlm.inference.step_plan import ImageMerge, ImageToEncode, Span, StepPlan

ROW_MULTIPLE = 8
"""With MKL in fp32, the result of a row is bitwise the same for 8, 16, 24 and 32 rows (layers.inference_linear). A
single token is not padded: a matrix-vector product is several times faster, and differs in the last bits."""


@dataclass(eq=False)
class Request:
    """A request inside the engine."""

    handle: Handle
    params: SamplingParams
    prompt: EncodedPrompt
    detokenizer: Detokenizer
    generator: torch.Generator
    ids: list[int]
    """Prompt and generated tokens."""
    submitted: float = 0.0
    """time.monotonic()"""
    computed: int = 0
    """Tokens whose keys and values are cached."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of its first full blocks."""
    holds_images: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.ids)

    @property
    def max_length(self) -> int:
        return self.prompt_length + self.params.max_new_tokens

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.ids) - self.prompt_length

    def block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first `count` blocks, which must be full."""
        for block in range(len(self.hashes), count):
            start, stop = block * block_size, (block + 1) * block_size
            images = [
                (image.digest, image.start - start)
                for image in self.prompt.images
                if image.start < stop and image.start + image.length > start
            ]
            parent = self.hashes[-1] if self.hashes else b""
            self.hashes.append(block_hash(parent, self.ids[start:stop], images))
        return self.hashes[:count]


@dataclass
class StepPart:
    """The tokens of one request in a step."""

    request: Request
    length: int
    logit_positions: list[int]
    """Their positions in the row whose logits are needed."""
    is_prefill: bool
    samples: bool
    """Whether the request's next token can be sampled after the step."""


@dataclass
class Step:
    """A plan and the requests it is made of."""

    plan: StepPlan
    parts: list[StepPart]


class ImageIndex:
    """Which images' features the ranks hold. Images without users are forgotten, the least recently used first."""

    def __init__(self, max_cached: int) -> None:
        self._max_cached = max_cached
        self._users: Counter[bytes] = Counter()
        self._encoded: OrderedDict[bytes, None] = OrderedDict()

    def acquire(self, images: list[PromptImage]) -> None:
        self._users.update(image.digest for image in images)

    def release(self, images: list[PromptImage]) -> None:
        self._users.subtract(image.digest for image in images)
        self._users += Counter()  # drops those at 0

    def is_encoded(self, digest: bytes) -> bool:
        """Whether its features are there; if not, the caller has them encoded in this step."""
        known = digest in self._encoded
        self._encoded[digest] = None
        self._encoded.move_to_end(digest)
        return known

    def forget(self) -> list[bytes]:
        """Digests of the images that are dropped now."""
        unused = [digest for digest in self._encoded if digest not in self._users]
        dropped = unused[: max(0, len(self._encoded) - self._max_cached)]
        for digest in dropped:
            del self._encoded[digest]
        return dropped


class Scheduler:
    """Waiting and running requests, first come first served. Used by one thread."""

    def __init__(self, config: InferenceConfig, allocator: BlockAllocator, slices: int = 1) -> None:
        """`slices` is the number of tensor and context ranks, each of which has a slice of a row.

        The length of a row is a multiple of it, and of ROW_MULTIPLE for each slice, unless the row is a single token.
        """
        self.config, self.allocator, self.slices = config, allocator, slices
        self.row_multiple = ROW_MULTIPLE * slices
        self.block_size = config.inference_dynamic_batching_block_size
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._images = ImageIndex(config.max_cached_images)

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a finished or cancelled request and release its blocks."""
        if request not in self.running:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.allocator.release(request.blocks)
        self._release_images(request)

    def next_step(self) -> Step | None:
        """Plan a step; None if there is no request."""
        budget = self.config.inference_dynamic_batching_max_tokens
        lengths: dict[Request, int] = {}
        # Decode first, so that prefill never delays running answers by more than a step.
        for request in sorted(self.running, key=lambda r: len(r.ids) - r.computed > 1):
            if budget:
                lengths[request] = min(budget, len(request.ids) - request.computed)
                budget -= lengths[request]
        while budget and self.waiting and len(self.running) < self.config.inference_max_requests:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.running.append(self.waiting.popleft())
            lengths[request] = min(budget, len(request.ids) - request.computed)
            budget -= lengths[request]
        return self._plan(lengths) if lengths else None

    def complete(self, step: Step) -> None:
        """Record that a step was computed: full blocks can be found by later requests."""
        for part in step.parts:
            request = part.request
            full_before = request.computed // self.block_size
            request.computed += part.length
            full = request.computed // self.block_size
            if self.config.enable_prefix_caching and full > full_before:
                hashes = request.block_hashes(full, self.block_size)
                for block in range(full_before, full):
                    self.allocator.register(request.blocks[block], hashes[block])
            if request.computed >= request.prompt_length:
                self._release_images(request)

    def _admit(self, request: Request) -> bool:
        """Take the blocks of a request, those of a known prefix included; False if too few are free."""
        known: list[int] = []
        if self.config.enable_prefix_caching and not request.params.prompt_logprobs:
            # At least one token is computed: the first new token needs its logits.
            full = (request.prompt_length - 1) // self.block_size
            known = self.allocator.find(request.block_hashes(full, self.block_size))
        own = self.allocator.allocate(-(-request.max_length // self.block_size) - len(known))
        if own is None:
            self.allocator.release(known)
            return False
        request.blocks = known + own
        request.computed = request.handle.cached_tokens = len(known) * self.block_size
        self._images.acquire(request.prompt.images)
        request.holds_images = True
        return True

    def _release_images(self, request: Request) -> None:
        if request.holds_images:
            self._images.release(request.prompt.images)
            request.holds_images = False

    def _plan(self, lengths: dict[Request, int]) -> Step:
        total = sum(lengths.values())
        padded = -(-total // self.row_multiple) * self.row_multiple if total > 1 else self.slices
        tokens, positions = np.zeros(padded, np.int64), np.zeros(padded, np.int64)
        plan = StepPlan(tokens, positions, spans=[], logit_positions=[])
        parts, start = [], 0
        for request, length in lengths.items():
            first, stop = request.computed, request.computed + length
            tokens[start : start + length] = request.ids[first:stop]
            positions[start : start + length] = np.arange(first, stop)
            used = -(-stop // self.block_size)
            plan.spans.append(Span(start, length, first, request.blocks[:used]))
            self._add_images(plan, request, start, length)
            wanted: list[int] = []
            if request.params.prompt_logprobs and first < request.prompt_length:
                wanted = list(range(start, start + length))
            elif stop == len(request.ids):
                wanted = [start + length - 1]
            plan.logit_positions += wanted
            parts.append(StepPart(request, length, wanted, first < request.prompt_length, stop == len(request.ids)))
            start += length
        plan.forget = self._images.forget()
        return Step(plan, parts)

    def _add_images(self, plan: StepPlan, request: Request, start: int, length: int) -> None:
        """The request's image tokens among `length` tokens from position `start` of the row."""
        first = request.computed
        for image in request.prompt.images:
            begin, end = max(image.start, first), min(image.start + image.length, first + length)
            if begin >= end:
                continue
            if not self._images.is_encoded(image.digest):
                plan.encode.append(ImageToEncode(image.digest, image.tiles, image.size, image.num_images))
            plan.merge.append(ImageMerge(start + begin - first, image.digest, begin - image.start, end - begin))
