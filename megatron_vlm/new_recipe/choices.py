"""Row length, batch size and length of a run, chosen from the measured lengths of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SAMPLES_PER_STEP = 128
"""LLaVA's batch of instruction tuning."""
_FROM_SCRATCH_PER_STEP = 48
"""More steps, of fewer samples: attention to the image appears after a number of steps, not of samples."""
_SAMPLES_PER_ROW = 16
_LEAST_STEPS = 200
"""Of a run, where the data are few: steps then have fewer samples."""
_LEAST_PER_STEP = 4
_MIN_ROW, _MAX_ROW = 256, 32768
_MIN_TILES = 64
_FROM_SCRATCH_SAMPLES = 130_000
"""Samples that a small model from random weights sees, repetitions included."""
_PASSES = ((100_000, 1), (20_000, 2), (0, 3))
"""(usable samples at least, passes over them) of a model that is trained further."""


@dataclass(frozen=True)
class Lengths:
    """What `init` knows of the usable samples."""

    samples: int
    mean: float
    """Tokens of a sample, image tokens included."""
    longest: int
    tiles: float
    """Tiles of a sample on average."""
    most_tiles: int

    @classmethod
    def of(cls, tokens: np.ndarray, tiles: np.ndarray) -> Lengths:
        """`tokens` and `tiles` [n] of the n > 0 usable samples."""
        return cls(len(tokens), float(tokens.mean()), int(tokens.max()), float(tiles.mean()), int(tiles.max()))


@dataclass(frozen=True)
class Choices:
    """The settings that follow from the data."""

    seq_length: int
    max_tiles_per_row: int
    global_batch_size: int
    epochs: int
    oversized: bool
    """Whether some samples are longer than a row, or than the model's context."""
    steps: int
    """About as many iterations as the epochs are."""


def choose(lengths: Lengths, context: int | None, *, from_scratch: bool, passes: int | None = None) -> Choices:
    """Choose the settings.

    Args:
        lengths: of the usable samples.
        context: tokens of the longest sample that the model takes; None: it is made to fit.
        from_scratch: whether all weights are random.
        passes: over the data; None: chosen.
    """
    longest = lengths.longest if context is None else min(lengths.longest, context)
    seq_length = min(_power_above(max(longest, _SAMPLES_PER_ROW * lengths.mean, _MIN_ROW)), _MAX_ROW)
    per_row = max(1.0, seq_length / lengths.mean)
    tiles = max(_MIN_TILES, lengths.most_tiles, _power_above(lengths.tiles * per_row))
    per_row = min(per_row, tiles / max(lengths.tiles, 1e-9))
    if passes is None:
        found = next(number for least, number in _PASSES if lengths.samples >= least)
        passes = max(1, round(_FROM_SCRATCH_SAMPLES / lengths.samples)) if from_scratch else found
    seen = lengths.samples * passes
    per_step = min(
        _FROM_SCRATCH_PER_STEP if from_scratch else SAMPLES_PER_STEP, max(_LEAST_PER_STEP, seen / _LEAST_STEPS)
    )
    rows = 2 ** max(0, round(math.log2(per_step / per_row)))
    limit = seq_length if context is None else min(seq_length, context)
    return Choices(
        seq_length=seq_length,
        max_tiles_per_row=tiles,
        global_batch_size=rows,
        epochs=passes,
        oversized=lengths.longest > limit,
        steps=max(1, math.ceil(seen / per_row / rows)),
    )


def _power_above(number: float) -> int:
    """The smallest power of two that is not below a positive number."""
    return int(2 ** math.ceil(math.log2(max(number, 1))))
