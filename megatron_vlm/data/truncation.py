"""Conversations longer than a row, cut after the last answer that fits.

What is kept is a conversation: whole questions with whole answers, and the images of those questions. The rest is left
out of training. Where each is cut is worked out once and kept beside the length index.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.length_index import LengthIndex
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn, encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.sources.sample_source import SampleSource
from megatron_vlm.data.worker_pool import parallel_map

logger = logging.getLogger(__name__)

_CHUNK = 16


@dataclass
class Truncations:
    """Of k samples of a source that are longer than a row."""

    samples: np.ndarray
    """[k] int64: their indices, ascending."""
    turns: np.ndarray
    """[k] int64: turns that are kept, questions and answers; 0: not even the first answer fits."""
    tokens: np.ndarray
    """[k] int64: of what is kept."""
    tiles: np.ndarray
    """[k] int64: of what is kept."""


@dataclass
class _Cutter:
    """Truncations samples of one source."""

    source: SampleSource
    index: LengthIndex
    oversized: np.ndarray
    tokenizer: Tokenizer
    geometry: ImageGeometry
    seq_length: int
    max_tiles: int

    def cut(self, number: int) -> tuple[int, int, int]:
        """(turns kept, their tokens, their tiles) of the number-th oversized sample, by bisection over its answers."""
        index = int(self.oversized[number])
        try:
            turns = self.source.metadata(index).turns
        except SampleError:  # it was good when it was measured: the row that needs it would tell
            return 0, 0, 0
        sizes = self.index.image_sizes(index)
        kept, beyond = (0, 0, 0), len(turns)
        while beyond - kept[0] > 2:
            middle = kept[0] + (beyond - kept[0]) // 4 * 2
            tokens, tiles = self._measure(turns[:middle], sizes)
            if tokens <= self.seq_length and tiles <= self.max_tiles:
                kept = (middle, tokens, tiles)
            else:
                beyond = middle
        return kept

    def _measure(self, turns: list[Turn], sizes: list[Size]) -> tuple[int, int]:
        shown = sizes[: count_images(turns)]
        positions = [num_image_tokens(size, self.geometry) for size in shown]
        encoded = encode_conversation(turns, self.tokenizer, positions, 0)
        return len(encoded.ids), sum(num_image_tiles(size, self.geometry) for size in shown)


def count_images(turns: list[Turn]) -> int:
    """Images that the questions among these turns show."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")


def load_truncations(
    source: SampleSource,
    index: LengthIndex,
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
    seq_length: int,
    max_tiles: int,
    processes: int | None = None,
) -> Truncations:
    """Where to cut the samples of a source that exceed a row: read from beside the index, or worked out and put there.

    Args:
        source: of the samples.
        index: of this source, tokenizer and geometry.
        tokenizer: gives the lengths of text.
        geometry: gives the lengths of images.
        seq_length: tokens of a row.
        max_tiles: tiles of a row.
        processes: that work; default: as many as this machine's cores.
    """
    path = index.file.with_suffix(f".cut-{seq_length}-{max_tiles}.arrays")
    try:
        return Truncations(**map_arrays(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is made anew", path, error)
    oversized = np.flatnonzero((index.tokens > seq_length) | (index.tiles > max_tiles))
    cutter = _Cutter(source, index, oversized, tokenizer, geometry, seq_length, max_tiles)
    found = parallel_map(cutter.cut, len(oversized), processes, f"cutting long samples of {source.name}", _CHUNK)
    table = np.array(list(found), np.int64).reshape(-1, 3)
    cuts = Truncations(oversized.astype(np.int64), *(np.ascontiguousarray(column) for column in table.T))
    try:
        write_arrays(path, samples=cuts.samples, turns=cuts.turns, tokens=cuts.tokens, tiles=cuts.tiles)
    except OSError as error:
        logger.warning("cuts cannot be kept in %s (%s): every process makes them", path.parent, error)
    return cuts
