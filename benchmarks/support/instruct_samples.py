"""Full-size samples with the length distribution of the published instruction mix, random tokens and random pixels."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.support.packing_lengths import sample_mix
from benchmarks.support.samples import PAD, Sample
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.packing.epoch_plan import Budget, plan_epoch
from megatron_vlm.data.packing.row_cost import cost_of_model
from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles
from megatron_vlm.data.rows.batch import IGNORE_INDEX, Document, PackedBatch, assemble_row

POOL_SIZE = 4000
"""Samples that rows are packed from."""
MIN_TEXT_TOKENS = 64
ANSWER_FRACTION = 0.5
"""Fraction of a sample's text tokens that are supervised."""


class InstructRows:
    """Rows packed from the mix, deterministic in `seed`."""

    def __init__(self, model: ModelConfig, seq_length: int, max_tiles: int, seed: int = 0) -> None:
        self.model, self.seq_length, self.rng = model, seq_length, np.random.default_rng(seed)
        self.geometry = ImageGeometry.of(model, "anyres")
        self._size_by_tiles = {num_image_tiles(size, self.geometry): size for size in self.geometry.pinpoints}
        mix = sample_mix(POOL_SIZE, self.rng)
        self._image_sizes = [self._sizes_for(int(tiles)) for tiles in mix.tiles]
        image_tokens = np.array([sum(num_image_tokens(s, self.geometry) for s in sizes) for sizes in self._image_sizes])
        self._text_tokens = np.minimum(
            np.maximum(mix.tokens - image_tokens, MIN_TEXT_TOKENS), seq_length - image_tokens
        )
        tokens = image_tokens + self._text_tokens
        tiles = np.array([sum(num_image_tiles(size, self.geometry) for size in sizes) for sizes in self._image_sizes])
        budget = Budget(seq_length, max_tiles, POOL_SIZE, cost_of_model(model))
        self._plan = plan_epoch(np.arange(POOL_SIZE), tokens, tiles, budget, seed, epoch=0)

    def _sizes_for(self, tiles: int) -> list[Size]:
        """Sizes of images with at most `tiles` tiles in total, each filling a grid, largest first."""
        sizes = []
        while fitting := [count for count in self._size_by_tiles if count <= tiles]:
            largest = max(fitting)
            sizes.append(self._size_by_tiles[largest])
            tiles -= largest
        return sizes

    def samples(self, row: int) -> list[Sample]:
        """The samples of a row, in packing order."""
        return [self._sample(int(number)) for number in self._plan.row(row)]

    def pack(self, samples: list[Sample]) -> PackedBatch:
        """Concatenate samples, with their tiles, into one row."""
        batch = assemble_row([sample.document for sample in samples], self.seq_length, PAD, self.geometry)
        batch.tiles = torch.cat([sample.tiles for sample in samples])
        return batch

    def _sample(self, number: int) -> Sample:
        sizes, text_tokens = self._image_sizes[number], int(self._text_tokens[number])
        answer_tokens = int(ANSWER_FRACTION * text_tokens)
        ids: list[np.ndarray] = []
        starts = []
        for size in sizes:
            starts.append(sum(map(len, ids)))
            ids.append(np.full(num_image_tokens(size, self.geometry), self.model.image_token_index))
        ids.append(self.rng.integers(PAD + 1, self.model.image_token_index, text_tokens))
        all_ids = np.concatenate(ids)
        labels = np.full(len(all_ids), IGNORE_INDEX)
        labels[len(all_ids) - answer_tokens :] = all_ids[len(all_ids) - answer_tokens :]
        counts = [num_image_tiles(size, self.geometry) for size in sizes]
        side = self.geometry.tile_size
        pixels = self.rng.integers(0, 256, (sum(counts), 3, side, side), np.uint8)
        document = Document(str(number), EncodedConversation(all_ids, labels, starts), sizes)
        return Sample(document, torch.from_numpy(pixels), counts)
