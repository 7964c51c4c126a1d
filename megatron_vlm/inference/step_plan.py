"""What one step of the engine computes. Rank 0 makes the plan; every rank runs it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_vlm.data.processing.tiling import Size


@dataclass
class Span:
    """Consecutive tokens of one request in a step: one token in decode, a chunk of the prompt in prefill."""

    start: int
    """First position in the row."""
    length: int
    context: int
    """Tokens of the request that are cached already."""
    blocks: list[int]
    """Blocks of the request's first context + length tokens, in order."""


@dataclass
class ImageToEncode:
    """An image whose features are not cached."""

    digest: bytes
    tiles: np.ndarray
    """[t, 3, side, side] uint8"""
    size: Size
    num_images: int
    """Images of its prompt."""


@dataclass
class ImageMerge:
    """Image tokens of a row and the features that replace their embeddings."""

    row_start: int
    digest: bytes
    feature_start: int
    length: int


@dataclass
class StepPlan:
    """One packed row, and what to do with it. The row is padded by documents of one token that are written to block 0.

    S is the length of the row with padding.
    """

    tokens: np.ndarray
    """[S] int64"""
    positions: np.ndarray
    """[S] int64, from 0 in each request."""
    spans: list[Span]
    logit_positions: list[int]
    """Positions in the row whose logits are needed, ascending."""
    encode: list[ImageToEncode] = field(default_factory=list)
    merge: list[ImageMerge] = field(default_factory=list)
    forget: list[bytes] = field(default_factory=list)
    """Digests of images whose cached features are dropped before the step."""
