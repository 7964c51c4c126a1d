"""First questions of fixed samples, which a model in training is asked at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from PIL import Image

from megatron_vlm.data.dataset import MixtureDataset
from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image
from megatron_vlm.data.sources.annotations import count_placeholders
from megatron_vlm.data.sources.sample_source import Sample


@dataclass(frozen=True)
class Question:
    """A sample up to its first answer."""

    sample_id: str
    turns: Sequence[Turn]
    """A question, perhaps after a system turn."""
    images: Sequence[Image.Image]
    """Those of the turns, in order."""
    answer: str
    """The first one of the sample."""

    @property
    def text(self) -> str:
        """What is asked, with its image placeholders."""
        return self.turns[-1].text


def choose_samples(dataset: MixtureDataset, number: int) -> list[int]:
    """Global numbers of `number` usable samples, or all if there are fewer, at equal distances over all sources."""
    usable = np.flatnonzero(dataset.usable)
    number = min(number, len(usable))
    return [int(usable[index * len(usable) // number]) for index in range(number)]


def read_question(dataset: MixtureDataset, number: int) -> Question:
    """The first question of the sample with this global number.

    Raises:
        SampleError: the annotation or an image cannot be read.
    """
    sample = dataset.mixture.sources.sample(number)
    turns = list(takewhile(lambda turn: turn.role != "gpt", sample.turns))
    images = [_read_image(sample, index) for index in range(count_placeholders(turns))]
    return Question(sample.id, turns, images, sample.turns[len(turns)].text.strip())


def _read_image(sample: Sample, index: int) -> Image.Image:
    try:
        return decode_image(sample.read_image(index))
    except (OSError, ImageUnreadable) as error:
        raise SampleError(
            sample.id, sample.file, "unreadable image", f"{sample.image_names[index]}: {error}",
            "It was readable when the data was measured. Restore the image.",
        ) from error  # fmt: skip
