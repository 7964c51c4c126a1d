"""The length index: tokens, tiles and image sizes of every sample of a source, measured once and kept.

Planning needs nothing else, so every rank plans by itself without reading an image. The index is kept under a name
made of everything the lengths follow from: the annotations' content, the tokenizer, the tiling and the template; when
one of them changes, another index is built. Refused samples are looked at again each time, so a mended image is taken
without more ado. An image that is replaced by one of another size while its annotation stays the same is found when
the row is built.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.data.array_files import map_arrays, write_arrays
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.processing.conversation import TEMPLATE, encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.sources.sample_source import SampleSource
from megatron_vlm.data.worker_pool import parallel_map
from megatron_vlm.runtime.atomic_files import atomic_file

logger = logging.getLogger(__name__)

REJECTED = -1
_FORMAT = "2"


@dataclass
class Rejection:
    """A sample that is left out, and why."""

    index: int
    """In its source."""
    sample_id: str
    reason: str
    message: str


@dataclass
class LengthIndex:
    """Lengths of the n samples of a source."""

    tokens: np.ndarray
    """[n] int32, image positions included; REJECTED where the sample is."""
    tiles: np.ndarray
    """[n] int32"""
    size_starts: np.ndarray
    """[n + 1] int64: sample i has the rows size_starts[i] to size_starts[i + 1] of `sizes`."""
    sizes: np.ndarray
    """[images, 2] int32: upright (width, height)"""
    rejected: list[Rejection]
    file: Path = Path()
    """Where it is kept. Its arrays are mapped from there: the ranks of a machine share their memory."""

    @property
    def rejected_file(self) -> Path:
        """File beside the index that lists the refused samples, one JSON object per line."""
        return self.file.with_suffix(".refused.jsonl")

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Upright (width, height) of each image of a sample."""
        rows = self.sizes[self.size_starts[index] : self.size_starts[index + 1]].tolist()
        return [(w, h) for w, h in rows]


@dataclass
class _Measure:
    """Lengths of one sample."""

    tokens: int
    tiles: int
    sizes: list[tuple[int, int]]
    rejection: Rejection | None = None


class _Measurer:
    """Measures samples of one source."""

    def __init__(self, source: SampleSource, tokenizer: Tokenizer, geometry: ImageGeometry) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.geometry = geometry

    def key(self) -> str:
        parts = [_FORMAT, TEMPLATE, self.source.content_hash(), self.tokenizer.fingerprint, repr(self.geometry)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def measure(self, index: int) -> _Measure:
        try:
            sample = self.source.metadata(index)
            sizes = sample.measure_images()
        except SampleError as error:
            return _Measure(REJECTED, 0, [], Rejection(index, error.sample_id, error.reason, str(error)))
        positions = sum(num_image_tokens(size, self.geometry) for size in sizes)
        # The text alone, and any image token does: only the number of ids is of interest.
        encoded = encode_conversation(sample.turns, self.tokenizer, [0] * len(sizes), 0)
        return _Measure(
            len(encoded.ids) + positions, sum(num_image_tiles(size, self.geometry) for size in sizes), sizes
        )


def load_length_index(
    source: SampleSource,
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
    cache_dir: str | Path | None = None,
    processes: int | None = None,
) -> LengthIndex:
    """The length index of a source: read from the cache, or built and put there.

    Safe when several processes do it at once: each writes a file of its own and renames it.

    Args:
        source: what to measure.
        tokenizer: gives the lengths of text.
        geometry: gives the lengths of images.
        cache_dir: where indexes are kept; default: `.lengths` in the folder of the annotations or beside the shards.
        processes: processes that measure; default: as many as this machine's cores, fewer for small sources.

    Raises:
        DataError: the cache folder cannot be written, or a measuring process died.
    """
    measurer = _Measurer(source, tokenizer, geometry)
    path = cache_folder(source.name, cache_dir) / f"{Path(source.name).stem}-{measurer.key()}.arrays"
    index = _read(path)
    changed = index is None
    if index is None:
        measures = parallel_map(measurer.measure, len(source), processes, f"measuring {source.name}")
        index = _collect(measures, len(source))
    elif index.rejected:
        again = {rejection.index: measurer.measure(rejection.index) for rejection in index.rejected}
        if any(measure.rejection != old for measure, old in zip(again.values(), index.rejected, strict=True)):
            index, changed = _replace(index, again), True
    index.file = path
    if changed:
        _write(path, index)
    return index


def cache_folder(source: str, cache_dir: str | Path | None) -> Path:
    """Where what is worked out of a source is kept: `cache_dir`, or `.lengths` beside the source."""
    return Path(cache_dir) if cache_dir else Path(source).parent / ".lengths"


def _collect(measures: Iterator[_Measure], total: int) -> LengthIndex:
    tokens, tiles = np.empty(total, np.int32), np.empty(total, np.int32)
    counts = np.zeros(total + 1, np.int64)
    sizes = array("i")  # not a list: of millions of samples that would take gigabytes
    refused = []
    for index, measure in enumerate(measures):
        tokens[index], tiles[index] = measure.tokens, measure.tiles
        counts[index + 1] = len(measure.sizes)
        for size in measure.sizes:
            sizes.extend(size)
        if measure.rejection:
            refused.append(measure.rejection)
    return LengthIndex(tokens, tiles, np.cumsum(counts), np.frombuffer(sizes, np.int32).reshape(-1, 2), refused)


def _replace(index: LengthIndex, again: dict[int, _Measure]) -> LengthIndex:
    """The index with some samples measured anew."""

    def measures() -> Iterator[_Measure]:
        for i in range(len(index.tokens)):
            yield again.get(i) or _Measure(int(index.tokens[i]), int(index.tiles[i]), index.image_sizes(i))

    return _collect(measures(), len(index.tokens))


def _read(path: Path) -> LengthIndex | None:
    try:
        arrays = map_arrays(path)
        refused = [Rejection(**item) for item in json.loads(arrays["refused"].tobytes())]
        return LengthIndex(arrays["tokens"], arrays["tiles"], arrays["size_starts"], arrays["sizes"], refused)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("length index %s is damaged (%s) and is built anew", path, error)
        return None


def _write(path: Path, index: LengthIndex) -> None:
    refused = [asdict(rejection) for rejection in index.rejected]
    arrays = {name: getattr(index, name) for name in ("tokens", "tiles", "size_starts", "sizes")}
    try:
        with atomic_file(index.rejected_file) as file:
            file.write("".join(json.dumps(rejection) + "\n" for rejection in refused).encode())
        write_arrays(path, **arrays, refused=np.frombuffer(json.dumps(refused).encode(), np.uint8))
    except OSError as error:
        raise DataError(f"the length index cannot be written to {path.parent}: {error}. Set cache_dir.") from error


def describe_rejections(source: SampleSource, index: LengthIndex) -> list[str]:
    """Lines that tell how many samples were refused for which reason, each reason with an example; none if none was."""
    if not index.rejected:
        return []
    counts = Counter(rejection.reason for rejection in index.rejected).most_common()
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
    examples = [
        next(rejection.message for rejection in index.rejected if rejection.reason == reason) for reason, _ in counts
    ]
    return [
        f"{source.name}: {len(index.rejected)} of {len(index.tokens)} samples refused: {reasons}; "
        f"all are listed in {index.rejected_file}. For example:",
        *examples,
    ]
