"""Samples shaped like the published instruction mix, with random words and pixels, at the real size."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.packing_lengths import draw_mix
from benchmarks.samples import PAD, Sample
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Document, PackedBatch, assemble_row
from megatron_vlm.data.packing.epoch_plan import Budget, plan_epoch
from megatron_vlm.data.packing.row_cost import cost_of_model
from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles

POOL = 4000
"""Samples that rows are packed from."""
FEWEST_WORDS = 64
ANSWERED = 0.5
"""Share of a sample's words that are answers."""


class InstructRows:
    """Rows packed from the mix; the same seed gives the same rows."""

    def __init__(self, model: ModelConfig, seq_length: int, max_tiles: int, seed: int = 0) -> None:
        self.model, self.seq_length, self.rng = model, seq_length, np.random.default_rng(seed)
        self.geometry = ImageGeometry.of(model, "anyres")
        self._size_of_tiles = self._sizes()
        mix = draw_mix(POOL, self.rng)
        self._images = [self._split(int(tiles)) for tiles in mix.tiles]
        shown = np.array([sum(num_image_tokens(size, self.geometry) for size in sizes) for sizes in self._images])
        self._words = np.minimum(np.maximum(mix.tokens - shown, FEWEST_WORDS), seq_length - shown)
        tokens = shown + self._words
        tiles = np.array([sum(num_image_tiles(size, self.geometry) for size in sizes) for sizes in self._images])
        budget = Budget(seq_length, max_tiles, POOL, cost_of_model(model))
        self._plan = plan_epoch(np.arange(POOL), tokens, tiles, budget, seed, epoch=0)

    def _sizes(self) -> dict[int, Size]:
        """An image that has so many tiles: one that fills a grid."""
        return {num_image_tiles(size, self.geometry): size for size in self.geometry.pinpoints}

    def _split(self, tiles: int) -> list[Size]:
        """Images with about as many tiles together."""
        images = []
        while fitting := [count for count in self._size_of_tiles if count <= tiles]:
            take = max(fitting)
            images.append(self._size_of_tiles[take])
            tiles -= take
        return images

    def samples(self, row: int) -> list[Sample]:
        """The samples of a row, in their order."""
        return [self._sample(int(number)) for number in self._plan.row(row)]

    def pack(self, samples: list[Sample]) -> PackedBatch:
        """Samples laid end to end, tiles included."""
        batch = assemble_row([sample.document for sample in samples], self.seq_length, PAD, self.geometry)
        batch.tiles = torch.cat([sample.tiles for sample in samples])
        return batch

    def _sample(self, number: int) -> Sample:
        sizes, words = self._images[number], int(self._words[number])
        answered = int(ANSWERED * words)
        ids: list[np.ndarray] = []
        starts = []
        for size in sizes:
            starts.append(sum(map(len, ids)))
            ids.append(np.full(num_image_tokens(size, self.geometry), self.model.image_token_index))
        ids.append(self.rng.integers(PAD + 1, self.model.image_token_index, words))
        whole = np.concatenate(ids)
        labels = np.full(len(whole), IGNORE_INDEX)
        labels[len(whole) - answered :] = whole[len(whole) - answered :]
        counts = [num_image_tiles(size, self.geometry) for size in sizes]
        side = self.geometry.tile_size
        pixels = self.rng.integers(0, 256, (sum(counts), 3, side, side), np.uint8)
        document = Document(str(number), EncodedConversation(whole, labels, starts), sizes)
        return Sample(document, torch.from_numpy(pixels), counts)
