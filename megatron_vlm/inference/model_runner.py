"""Runs the plan of a step on this rank: its pipeline stages of the model with their part of the key/value cache.

    first stage: embedding, image features -> layers -> hidden states to the next stage -> ... -> logits

Under context parallelism the row of a step is sliced as in training: attention exchanges slices of the row for slices
of the heads, so that each context rank caches whole sequences of its heads.

Every image is encoded by itself, no request attends to another, and matrix products have a number of rows for which
BLAS computes each row alike (ROW_MULTIPLE). So what else is in a step changes logits by rounding at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vlm.config import ConfigError, InferenceConfig
from megatron_vlm.data.processing.image_tokens import RowFeatures
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch, tile_range
from megatron_vlm.data.rows.rank_batch import rank_batch
from megatron_vlm.inference.batched_kv_cache import BatchedKVCache
from megatron_vlm.inference.decode_graphs import CudaGraphs, DecodeGraphs
from megatron_vlm.inference.kv_cache import PagedKVCache
from megatron_vlm.inference.paged_kernels import paged_kernel
from megatron_vlm.inference.scheduler import ROW_MULTIPLE
from megatron_vlm.inference.sizes import max_sequence_length
from megatron_vlm.inference.step_plan import ImageToEncode, StepPlan
from megatron_vlm.model.image_merge import encode_tiles, merge_image_features
from megatron_vlm.model.layers.packed_sequence import PackedSequence, rotary_tables
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.process_groups import tile_shard_rank


class ModelRunner:
    """This rank's model chunks (one, or one per virtual stage) and their caches of keys, values and image features."""

    def __init__(
        self,
        chunks: Sequence[VisionLanguageModel],
        config: InferenceConfig,
        num_blocks: int,
        engine_rank: int,
        only_inference: bool = False,
    ) -> None:
        """`only_inference`: steps run in torch.inference_mode, which takes a tenth off the time of a single token on a
        CPU. Tensors made in it can't be used in training; megatron-core keeps some, such as its memory buffer.

        Raises:
            ConfigError: CUDA graphs are asked for, and cannot be used here.
        """
        self._no_gradients = torch.inference_mode if only_inference else torch.no_grad
        self._chunks = [chunk.eval() for chunk in chunks]
        self.model, self.recipe = chunks[0], chunks[0].recipe
        self._engine_rank = engine_rank
        self.device = current_device()
        block_size = config.inference_dynamic_batching_block_size
        kernel = paged_kernel(self.recipe, block_size)
        self._cache: PagedKVCache | BatchedKVCache = (
            PagedKVCache(num_blocks, block_size) if kernel is None else BatchedKVCache(num_blocks, block_size, kernel)
        )
        self._graphs = self._decode_graphs(config) if config.cuda_graph_impl == "local" else None
        self._geometry = ImageGeometry.of(
            self.recipe.model, self.recipe.data.image_aspect_ratio, self.recipe.data.multi_image_aspect_ratio
        )
        self._features: dict[bytes, torch.Tensor] = {}
        """Hash of an image's tiles -> its features [image tokens, H], newlines included. The scheduler says when to
        drop them (StepPlan.forget)."""
        self._dtype = next(self.model.parameters()).dtype
        self._context_rank = parallel_state.get_context_parallel_rank()
        self._context_ranks = parallel_state.get_context_parallel_world_size()

    def _decode_graphs(self, config: InferenceConfig) -> DecodeGraphs:
        cache, problem = self._cache, None
        if not (len(self._chunks) == 1 and self.model.pre_process and self.model.post_process):
            problem = "is for a model without pipeline parallelism"
        elif parallel_state.get_tensor_and_context_parallel_world_size() > 1:
            problem = "is for a model without tensor and context parallelism"
        elif not isinstance(cache, BatchedKVCache) or not cache.kernel.reads_blocks:
            problem = (
                "needs a GPU, bf16, and flash_attn_3, or flash_attn_2 with inference_dynamic_batching_block_size = 256"
            )
        if problem is not None:
            raise ConfigError(f"cuda_graph_impl = local: {problem}. Use none.")
        assert isinstance(cache, BatchedKVCache)
        most_blocks = -(-max_sequence_length(self.recipe, config) // cache.block_size)
        return DecodeGraphs(self._all_logits, cache, most_blocks, self.device, CudaGraphs())

    def run(self, plan: StepPlan) -> torch.Tensor | None:
        """Compute a step. On the engine's rank, returns the fp32 logits [n, V] at plan.logit_positions; they are valid
        until the next step."""
        for digest in plan.forget if self.model.pre_process else ():
            del self._features[digest]
        with self._no_gradients():
            if self._graphs is not None and self._graphs.can_run(plan):
                return self._graphs.run(plan)
            return self._run(plan)

    def _all_logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """fp32 logits [s, V] of all tokens [s] of a row without images."""
        language_model = self.model.language_model
        hidden = language_model.decode(language_model.embed(tokens), self._packed_sequence(positions))
        return language_model.logits(hidden, torch.arange(len(tokens), device=self.device))

    def _run(self, plan: StepPlan) -> torch.Tensor | None:
        self._cache.start_step(plan, self.device, self._dtype)
        packed = self._packed_sequence(torch.from_numpy(plan.positions).to(self.device))
        for chunk in self._chunks:
            if chunk.pre_process:
                hidden = self._embed(plan)
            else:
                hidden = self._receive(len(plan.tokens))
                chunk.set_input_tensor(hidden)
            hidden = chunk.language_model.decode(hidden, packed)
            if not chunk.post_process:
                dist.send(hidden, parallel_state.get_pipeline_model_parallel_next_rank())
        if not self._chunks[-1].post_process:
            return self._receive_logits(plan) if dist.get_rank() == self._engine_rank else None
        logits = self._logits(hidden, plan)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            is_first = parallel_state.get_tensor_model_parallel_rank() == self._context_rank == 0
            if is_first and len(logits):
                dist.send(logits.contiguous(), self._engine_rank)
            return None
        return logits

    def _packed_sequence(self, positions: torch.Tensor) -> PackedSequence:
        language = self.recipe.model.language
        cos, sin = rotary_tables(positions, language.head_width, language.rope_theta)
        return PackedSequence(qkv_format="thd", cos=cos, sin=sin, cache=self._cache)

    def _logits(self, hidden: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """[n, V] fp32"""
        count = len(plan.logit_positions)
        if not count:
            return hidden.new_empty(0, self.recipe.model.language.vocab_size, dtype=torch.float32)
        padding = -count % ROW_MULTIPLE if len(plan.tokens) > 1 else 0
        where = torch.tensor(plan.logit_positions + [0] * padding, device=self.device)
        head = self._chunks[-1].language_model
        if self._context_ranks == 1:
            return head.logits(hidden, where)[:count]
        length = len(plan.tokens) // self._context_ranks
        where -= self._context_rank * length
        logits = head.logits(hidden, where.clamp(0, length - 1))[:count]
        elsewhere = ((where < 0) | (where >= length))[:count]
        logits[elsewhere] = 0  # every position is in the slice of one context rank
        dist.all_reduce(logits, group=parallel_state.get_context_parallel_group())
        return logits

    def _receive(self, length: int) -> torch.Tensor:
        """Hidden states [s / (cp * tp), 1, H] of the previous stage."""
        config = self.model.config
        slices = self._context_ranks * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        hidden = torch.empty(length // slices, 1, config.hidden_size, dtype=self._dtype, device=self.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _receive_logits(self, plan: StepPlan) -> torch.Tensor:
        shape = len(plan.logit_positions), self.recipe.model.language.vocab_size
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        if len(logits):
            dist.recv(logits, parallel_state.get_pipeline_model_parallel_last_rank())
        return logits

    def _embed(self, plan: StepPlan) -> torch.Tensor:
        """Embeddings of this rank's slice of the row with image features, [s / (cp * tp), 1, H]."""
        for image in plan.encode:
            self._features[image.digest] = self._encode(image)
        length = len(plan.tokens) // self._context_ranks
        first = self._context_rank * length
        tokens = torch.from_numpy(plan.tokens[first : first + length]).to(self.device)
        hidden = self.model.language_model.embed(tokens)
        if self.model.config.sequence_parallel:
            first += parallel_state.get_tensor_model_parallel_rank() * len(hidden)
        for merge in plan.merge:
            start, stop = merge.row_start - first, merge.row_start - first + merge.length
            begin, end = max(start, 0), min(stop, len(hidden))
            if begin < end:
                offset = merge.feature_start - start
                hidden[begin:end, 0] = self._features[merge.digest][begin + offset : end + offset]
        return hidden

    def _encode(self, image: ImageToEncode) -> torch.Tensor:
        """Features of all tokens of an image, newlines included, on every rank of the stage: [image tokens, H]."""
        image_tokens = RowFeatures(self._geometry)
        image_tokens.add(image.size, 0, image.num_images)
        fields = image_tokens.fields()
        start, stop = tile_range(image_tokens.num_tiles, *tile_shard_rank(self.recipe.parallel))
        tokens = torch.zeros_like(fields["feature_positions"])
        batch = PackedBatch(
            tokens=tokens,
            labels=torch.full_like(tokens, IGNORE_INDEX),
            positions=torch.arange(len(tokens)),
            cu_seqlens=[0, len(tokens)],
            num_tiles=image_tokens.num_tiles,
            tiles=torch.from_numpy(image.tiles[start:stop]) if start < stop else None,
            **fields,
        )
        model = self.model
        # Every rank merges all tokens of the image.
        view = replace(model.view, context=(0, 1), sequence=(0, 1), is_last_stage=False)
        row = rank_batch(batch, view).to(self.device)
        features = encode_tiles(model.vision_model, model.projector, row, view, tower_is_frozen=True)
        width = self.recipe.model.language.hidden_size
        empty = torch.zeros(len(tokens), 1, width, dtype=self._dtype, device=self.device)
        return merge_image_features(empty, features, model.image_newline, row)[:, 0]
