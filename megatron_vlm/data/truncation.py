"""Truncation of conversations that are longer than a row, after the last answer that fits.

What remains is a conversation: whole questions with whole answers, and the images of those questions. The later turns
are not trained on. The truncations of a source are computed once and cached beside its length index.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.length_index import LengthIndex
from megatron_vlm.data.processing.conversation import Turn, encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.sources.annotations import count_placeholders
from megatron_vlm.data.sources.sample_source import SampleSource
from megatron_vlm.data.worker_pool import parallel_map

logger = logging.getLogger(__name__)

_CHUNK = 16


@dataclass
class Truncations:
    """How k samples of a source that are longer than a row are truncated."""

    samples: np.ndarray
    """[k] int64: their indices, ascending."""
    turns: np.ndarray
    """[k] int64: number of turns kept: questions, answers and a system turn; 0: not even the first answer fits."""
    tokens: np.ndarray
    """[k] int64: tokens after truncation."""
    tiles: np.ndarray
    """[k] int64: tiles after truncation."""


@dataclass
class _Truncator:
    """Truncates samples of one source."""

    source: SampleSource
    index: LengthIndex
    oversized: np.ndarray
    tokenizer: Tokenizer
    geometry: ImageGeometry
    max_tokens: int
    max_tiles: int

    def truncate(self, i: int) -> tuple[int, int, int]:
        """(turns kept, their tokens, their tiles) of the i-th oversized sample, by bisection over its answers."""
        index = int(self.oversized[i])
        try:
            turns = self.source.metadata(index).turns
        except SampleError:  # the sample was valid when it was measured: building its row will raise an error
            return 0, 0, 0
        sizes = self.index.image_sizes(index)
        system = int(turns[0].role == "system")
        fits, answers, too_many = (0, 0, 0), 0, len(turns) // 2
        while too_many - answers > 1:
            middle = (answers + too_many) // 2
            kept = system + 2 * middle
            tokens, tiles = self._measure(turns[:kept], sizes)
            if tokens <= self.max_tokens and tiles <= self.max_tiles:
                fits, answers = (kept, tokens, tiles), middle
            else:
                too_many = middle
        return fits

    def _measure(self, turns: list[Turn], sizes: list[Size]) -> tuple[int, int]:
        geometry = self.geometry.for_sample(len(sizes))
        sizes = sizes[: count_placeholders(turns)]
        image_lengths = [num_image_tokens(size, geometry) for size in sizes]
        encoded = encode_conversation(turns, self.tokenizer, image_lengths, 0)
        return len(encoded.ids), sum(num_image_tiles(size, geometry) for size in sizes)


def load_truncations(
    source: SampleSource,
    index: LengthIndex,
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
    max_tokens: int,
    max_tiles: int,
    processes: int | None = None,
) -> Truncations:
    """Read the truncations of a source's oversized samples from the cache, or compute and cache them.

    Args:
        source: the source of the samples.
        index: its length index, for the same tokenizer and geometry.
        tokenizer: determines the lengths of text.
        geometry: determines the lengths of images.
        max_tokens: maximum number of tokens of a sample.
        max_tiles: maximum number of tiles of a row.
        processes: number of processes that work; default: one per core.
    """
    path = index.file.with_suffix(f".cut-{max_tokens}-{max_tiles}.arrays")
    try:
        return Truncations(**map_arrays(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is computed again", path, error)
    oversized = np.flatnonzero((index.tokens > max_tokens) | (index.tiles > max_tiles))
    truncate = _Truncator(source, index, oversized, tokenizer, geometry, max_tokens, max_tiles).truncate
    rows = parallel_map(truncate, len(oversized), processes, f"truncating long samples of {source.name}", _CHUNK)
    table = np.array(list(rows), np.int64).reshape(-1, 3)
    result = Truncations(oversized.astype(np.int64), *(np.ascontiguousarray(column) for column in table.T))
    try:
        write_arrays(path, **vars(result))
    except OSError as error:
        logger.warning("truncations cannot be cached in %s (%s): every process computes its own", path.parent, error)
    return result
