"""Answers of the model in training to fixed held-out questions, by the engine on the training ranks.

    copy 0: questions 0, D, ...       -> engine -.
    copy 1: questions 1, D + 1, ...   -> engine --> rank 0: metrics writers
    ...                                          (D copies: one per data-parallel rank)

The engine works on the live weights, between two iterations. It leaves them, gradients, optimizer and random states as
they are, so that a run with samples is the same as one without.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config import InferenceConfig, Recipe
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.questions import Question, choose_samples, read_question
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.prompts import EncodedPrompt, encode
from megatron_vlm.inference.ranks import PlanChannel, engine_rank, serve_rank
from megatron_vlm.inference.request import Prompt, SamplingParams
from megatron_vlm.inference.sizes import block_bytes
from megatron_vlm.model.sharding import unwrap
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.training.callbacks import Callback
from megatron_vlm.training.metrics import Answer
from megatron_vlm.training.optimizer import synchronize_parameters

_CACHE_GIB = 1.0
"""Memory of the key/value cache, unless the longest question needs more. It is freed after each evaluation."""
_LOGGED_CHARACTERS = 80


class TrainingSamples(Callback):
    """Generates training.eval_generate_samples answers after each evaluation, and hands them to the metrics of rank 0.

    The recipe must have passed check_recipe, and the run must have validation data.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_train_start(self, trainer: Any) -> None:
        """Read the questions. Raises SampleError if one cannot be read."""
        self._trainer, dataset = trainer, trainer.validation.dataset
        self._chunks: list[VisionLanguageModel] = [unwrap(chunk) for chunk in trainer.chunks]
        self._tokenizer = dataset.tokenizer
        self._channel = PlanChannel(timedelta(minutes=self.recipe.training.distributed_timeout_minutes))
        self._has_engine = dist.get_rank() == engine_rank()
        numbers = choose_samples(dataset, self.recipe.training.eval_generate_samples)
        copy, copies = trainer.ranks.data, trainer.ranks.data_size
        self._shown: list[Question] = []
        self._prompts: dict[int, EncodedPrompt] = {}
        """Index of a question among all -> its prompt, of those that this rank's engine answers."""
        for index, number in enumerate(numbers):
            is_own = self._has_engine and index % copies == copy
            if not (is_own or dist.get_rank() == 0):
                continue
            question = read_question(dataset, number)
            if is_own:
                self._prompts[index] = self._encode(question)
            if dist.get_rank() == 0:
                self._shown.append(question)
        self._config = self._engine_config(-(-len(numbers) // copies))

    def _encode(self, question: Question) -> EncodedPrompt:
        data = self.recipe.data
        geometry = ImageGeometry.of(self.recipe.model, data.image_aspect_ratio, data.multi_image_aspect_ratio)
        return encode(Prompt(question.turns, question.images), self._tokenizer, geometry, self.recipe.model)

    def _engine_config(self, requests: int) -> InferenceConfig:
        """The same on every rank: a cache in which the longest question has room."""
        longest = max((len(prompt.ids) for prompt in self._prompts.values()), default=0)
        length = torch.tensor(longest + self.recipe.training.eval_max_new_tokens, device=current_device())
        dist.all_reduce(length, op=dist.ReduceOp.MAX)
        limit = self.recipe.model.language.max_position_embeddings
        config = InferenceConfig(
            inference_max_requests=requests,
            inference_max_seq_length=min(int(length), limit),
            enable_prefix_caching=False,
            max_queued_requests=requests,
            max_cached_images=0,
        )
        block_size = config.inference_dynamic_batching_block_size
        blocks = -(-config.inference_max_seq_length // block_size) + 1
        needed = blocks * block_bytes(self._chunks, block_size) / 2**30
        config.inference_dynamic_batching_buffer_size_gb = max(_CACHE_GIB, needed)
        return config

    def on_eval(self, iteration: int, metrics: dict[str, float]) -> None:
        """Generate the answers of this rank's share of the questions; rank 0 gets all."""
        trainer, started = self._trainer, time.perf_counter()
        with trainer.watchdog.paused(), trainer.metrics.timer.phase("generation"):
            synchronize_parameters(trainer.chunks)
            try:
                own = self._generate()
            finally:
                for chunk in trainer.chunks:
                    chunk.train()
            of_all_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_all_ranks, own)
        if dist.get_rank() != 0:
            return
        texts = {index: text for answers in of_all_ranks for index, text in answers.items()}
        trainer.metrics.add_answers(
            [
                Answer(question.sample_id, question.text, question.answer, texts[index], question.images)
                for index, question in enumerate(self._shown)
            ]
        )
        first = self._shown[0]
        log_rank0(
            f"answered {len(texts)} validation questions in {time.perf_counter() - started:.1f} s; sample "
            f"{first.sample_id!r}: {texts[0][:_LOGGED_CHARACTERS]!r}, in the data: "
            f"{first.answer[:_LOGGED_CHARACTERS]!r}"
        )

    def _generate(self) -> dict[int, str]:
        """Index of each question of this rank -> its answer. Every rank of a copy of the model calls this."""
        if not self._has_engine:
            serve_rank(self._chunks, self._config, self._channel)
            return {}
        with Engine(self._chunks, self._tokenizer, self._config, self._channel) as engine:
            handles = {}
            for index, prompt in self._prompts.items():
                new_tokens = min(self.recipe.training.eval_max_new_tokens, engine.max_new_tokens(prompt))
                if new_tokens > 0:
                    # A seed, although greedy decoding needs none: without one the process's random state would change.
                    handles[index] = engine.submit(prompt, SamplingParams(new_tokens, seed=0))
            answers = dict.fromkeys(self._prompts, "")
            for index, handle in handles.items():
                ids = [output.token_id for output in handle if output.token_id is not None]
                answers[index] = self._tokenizer.decode(ids)
            return answers
