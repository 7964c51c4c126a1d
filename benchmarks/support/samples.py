"""Random samples with the lengths of easy-VQA conversations, and the rows and batches that both loops train on.

easy-VQA's training split has between 2 and 21 questions about each image. As in LLaVA's data, a sample is a
conversation about one image. Two of three samples hold between one and all questions of an image; the third is a
caption. The lengths of turns are those of the published tokenizer and conversation template.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.config import ModelConfig
from megatron_vlm.data.packing.epoch_plan import Budget, plan_epoch
from megatron_vlm.data.processing.conversation import EncodedConversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles
from megatron_vlm.data.rows.batch import IGNORE_INDEX, Document, PackedBatch, assemble_row

IMAGES_BY_QUESTIONS = {
    2: 9, 3: 31, 4: 72, 5: 180, 6: 251, 7: 380, 8: 518, 9: 531, 10: 538, 11: 490, 12: 382, 13: 240, 14: 159, 15: 111,
    16: 53, 17: 26, 18: 22, 19: 5, 20: 1, 21: 1,
}  # fmt: skip
"""Number of images of easy-VQA's training split (4,000 in all) by their number of questions."""
IMAGE_SIZE = (64, 64)
"""(width, height) in pixels of every easy-VQA image."""
CAPTION_FRACTION = 1 / 3
USER_ROLE, ASSISTANT_ROLE = 6, 6
"""Tokens of `<|user|>\\n` plus the newline after the question, and of `<|assistant|>\\n`."""
QUESTION, ANSWER, CAPTION = (6, 10), (3, 4), (9, 12)
"""(minimum, maximum) tokens; answers include the end-of-sequence token and the newline after it."""
PAD = 1


@dataclass
class Sample:
    """One conversation about one image."""

    document: Document
    tiles: torch.Tensor
    """[n, 3, image_size, image_size] uint8, of all images"""
    tile_counts: list[int]
    """Number of tiles of each image."""

    def __len__(self) -> int:
        return len(self.document.encoded.ids)


class SampleGenerator:
    """Random samples for a model, deterministic in `seed`."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.geometry = ImageGeometry.of(model, "anyres")
        self.image_tokens = num_image_tokens(IMAGE_SIZE, self.geometry)
        self.tiles = num_image_tiles(IMAGE_SIZE, self.geometry)
        self.questions = np.repeat(list(IMAGES_BY_QUESTIONS), list(IMAGES_BY_QUESTIONS.values()))

    def _randint(self, bounds: tuple[int, int]) -> int:
        return int(self.rng.integers(bounds[0], bounds[1] + 1))

    def sample(self, number: int) -> Sample:
        """A caption, or a conversation of one or more questions."""
        if self.rng.random() < CAPTION_FRACTION:
            turns = [(self._randint(QUESTION), self._randint(CAPTION))]
        else:
            count = self._randint((1, int(self.rng.choice(self.questions))))
            turns = [(self._randint(QUESTION), self._randint(ANSWER)) for _ in range(count)]
        return self._conversation(str(number), [(1, turns)])

    def row_long_sample(self, length: int) -> Sample:
        """One conversation of exactly `length` tokens, which fills a row without packing; ten turns per image."""
        blocks, turn = [], (QUESTION[1], ANSWER[1])
        turn_length = USER_ROLE + ASSISTANT_ROLE + sum(turn)
        left = length - 1
        while left >= self.image_tokens + 1 + 11 * turn_length:
            blocks.append((1, [turn] * 10))
            left -= self.image_tokens + 1 + 10 * turn_length
        count, rest = divmod(left, turn_length)
        blocks.append((0, [turn] * (count - 1) + [(turn[0] + rest, turn[1])]))
        return self._conversation("row", blocks)

    def _conversation(self, name: str, blocks: list[tuple[int, list[tuple[int, int]]]]) -> Sample:
        """`blocks`: (number of images before the first question, (question tokens, answer tokens) of each turn)."""
        ids: list[np.ndarray] = [self._random_tokens(1)]
        supervised: list[np.ndarray] = [np.zeros(1, bool)]
        image_starts = []

        def add(tokens: np.ndarray, is_answer: bool = False) -> None:
            ids.append(tokens)
            supervised.append(np.full(len(tokens), is_answer))

        for images, turns in blocks:
            for _ in range(images):
                image_starts.append(sum(map(len, ids)))
                add(np.full(self.image_tokens, self.model.image_token_index))
                add(self._random_tokens(1))
            for question, answer in turns:
                add(self._random_tokens(USER_ROLE + question + ASSISTANT_ROLE))
                add(self._random_tokens(answer), is_answer=True)
        all_ids = np.concatenate(ids)
        labels = np.where(np.concatenate(supervised), all_ids, IGNORE_INDEX)
        encoded = EncodedConversation(all_ids, labels, image_starts)
        side = self.model.vision.image_size
        tiles = self.rng.integers(0, 256, (self.tiles * len(image_starts), 3, side, side), np.uint8)
        images = len(image_starts)
        document = Document(name, encoded, [IMAGE_SIZE] * images)
        return Sample(document, torch.from_numpy(tiles), [self.tiles] * images)

    def _random_tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(PAD + 1, self.model.image_token_index, count)

    def row(self, samples: list[Sample], seq_length: int) -> PackedBatch:
        """Concatenate samples, with their tiles, into one row."""
        batch = assemble_row([sample.document for sample in samples], seq_length, PAD, self.geometry)
        batch.tiles = torch.cat([sample.tiles for sample in samples])
        return batch


@dataclass
class Workload:
    """The same samples as packed rows and as padded batches, in the same number of optimizer steps."""

    rows: list[list[PackedBatch]]
    """Packed rows of each step."""
    packed: list[list[Sample]]
    """Samples of those rows, in row order."""
    padded: list[list[Sample]]
    """Samples of each step of a loop that shuffles them."""
    grouped: list[list[Sample]]
    """Samples of each step of a loop that groups by length."""

    @property
    def samples(self) -> int:
        return sum(map(len, self.padded))

    @property
    def tokens(self) -> int:
        return sum(len(sample) for step in self.padded for sample in step)


def build_workload(generator: SampleGenerator, steps: int, rows_per_step: int, seq_length: int) -> Workload:
    """Generate and pack more samples than needed, and keep those of the first steps * rows_per_step rows."""
    wanted = steps * rows_per_step
    pool = [generator.sample(number) for number in range(4 * wanted * seq_length // (generator.image_tokens + 100))]
    lengths = np.array([len(sample) for sample in pool])
    tiles = np.array([len(sample.tiles) for sample in pool])
    budget = Budget(seq_length, int(tiles.sum()), len(pool))
    plan = plan_epoch(np.arange(len(pool)), lengths, tiles, budget, int(generator.rng.integers(1 << 31)), epoch=0)
    rows = [[pool[number] for number in plan.row(index)] for index in range(wanted)]
    samples = [sample for row in rows for sample in row]
    shuffled = [samples[index] for index in generator.rng.permutation(len(samples))]
    # With so few batches, transformers' length-grouped sampler sorts all samples, longest first.
    by_length = sorted(shuffled, key=len, reverse=True)
    step_rows = [rows[step * rows_per_step : (step + 1) * rows_per_step] for step in range(steps)]
    return Workload(
        rows=[[generator.row(row, seq_length) for row in step] for step in step_rows],
        packed=[[sample for row in step for sample in row] for step in step_rows],
        padded=_split_evenly(shuffled, steps),
        grouped=_split_evenly(by_length, steps),
    )


def _split_evenly(samples: list[Sample], steps: int) -> list[list[Sample]]:
    ends = np.linspace(0, len(samples), steps + 1).astype(int)
    return [samples[start:end] for start, end in zip(ends, ends[1:], strict=False)]
