"""The length index: tokens, tiles and image sizes of every sample of a source, measured once and cached.

Planning needs nothing else, so every rank plans by itself without reading an image. The cache key covers everything the
lengths depend on: the annotations, the tokenizer, the image geometry and the conversation template. When one of them
changes, a new index is built. A sample that was rejected for an image is measured again when the size or the time of
one of its image files is another, so a repaired image is used from the next start on. If an image is replaced by one of
another size under the same annotation, building its row reports it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.data.array_files import cache_folder, map_arrays, write_arrays
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.partial_files import PartialFiles, timed_batches
from megatron_vlm.data.processing.chat_template import TemplateError
from megatron_vlm.data.processing.conversation import EncodedConversation, encode_conversation, template_fingerprint
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.sources.file_cache import file_state
from megatron_vlm.data.sources.sample_source import Sample, SampleSource
from megatron_vlm.data.worker_pool import parallel_map
from megatron_vlm.runtime.atomic_files import atomic_file
from megatron_vlm.runtime.file_lock import file_lock

logger = logging.getLogger(__name__)

REJECTED = -1
_FORMAT = "3"
_REJECTED_SUFFIX = ".refused.jsonl"
_PART_SECONDS = 30.0
"""Of measuring are lost at most when the process is killed."""
_REJECTIONS = "refused"
"""Name of the array of rejections in the file, which is JSON in bytes."""


@dataclass
class Rejection:
    """A sample that is not used, and why."""

    index: int
    """In its source."""
    sample_id: str
    reason: str
    message: str
    image_files: dict[str, list[int]] | None = None
    """[size, modification time in ns] of each image file of the sample when it was measured, [] for a missing one.
    Empty if the annotation alone is the reason. None: not recorded, in an index of an earlier version.
    """

    @property
    def is_stale(self) -> bool:
        """Whether the sample may be usable by now: an image file changed, or it is not known whether one did."""
        if self.image_files is None:
            return True
        return any(_file_state(name) != state for name, state in self.image_files.items())


@dataclass
class LengthIndex:
    """Lengths of the n samples of a source."""

    tokens: np.ndarray
    """[n] int32: tokens of each sample, image tokens included; REJECTED for a rejected one."""
    tiles: np.ndarray
    """[n] int32"""
    size_starts: np.ndarray
    """[n + 1] int64: sample i has the rows size_starts[i] to size_starts[i + 1] of `sizes`."""
    sizes: np.ndarray
    """[images, 2] int32: upright (width, height)"""
    rejected: list[Rejection]
    file: Path = Path()
    """The cached file. The arrays are mapped from it, so the ranks of a machine share their memory."""

    @property
    def rejected_file(self) -> Path:
        """File beside the index that lists the rejected samples, one JSON object per line."""
        return self.file.with_suffix(_REJECTED_SUFFIX)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Upright (width, height) of each image of a sample."""
        rows = self.sizes[self.size_starts[index] : self.size_starts[index + 1]].tolist()
        return [(w, h) for w, h in rows]


@dataclass
class _SampleLengths:
    tokens: int
    tiles: int
    sizes: list[tuple[int, int]]
    rejection: Rejection | None = None


class _Measurer:
    """Measures the samples of one source."""

    def __init__(self, source: SampleSource, tokenizer: Tokenizer, geometry: ImageGeometry, verify: bool) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.verify = verify

    def cache_key(self) -> str:
        template = template_fingerprint(self.tokenizer)
        parts = [_FORMAT, template, self.source.content_hash(), self.tokenizer.fingerprint, repr(self.geometry)]
        parts += ["verified"] if self.verify else []
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def measure(self, index: int) -> _SampleLengths:
        files: dict[str, list[int]] = {}
        try:
            sample = self.source.metadata(index)
            try:
                sizes = sample.measure_images(self.verify)
            except SampleError:
                files = {str(file.absolute()): _file_state(file) for file in sample.image_files}
                raise
            # Only the number of text tokens is needed: images count 0 here, and any image_token_index will do.
            text = self._encode(sample, len(sizes))
        except SampleError as error:
            return _SampleLengths(REJECTED, 0, [], Rejection(index, error.sample_id, error.reason, str(error), files))
        geometry = self.geometry.for_sample(len(sizes))
        image_tokens = sum(num_image_tokens(size, geometry) for size in sizes)
        tiles = sum(num_image_tiles(size, geometry) for size in sizes)
        return _SampleLengths(len(text.ids) + image_tokens, tiles, sizes)

    def _encode(self, sample: Sample, num_images: int) -> EncodedConversation:
        try:
            return encode_conversation(sample.turns, self.tokenizer, [0] * num_images, 0)
        except TemplateError as error:
            remedy = "Change the conversation, or set chat_template."
            raise SampleError(sample.id, sample.file, "chat template", str(error), remedy) from error


def load_length_index(
    source: SampleSource,
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
    cache_dir: str | Path | None = None,
    processes: int | None = None,
    verify_images: bool = False,
) -> LengthIndex:
    """Read the length index of a source from the cache, or build and cache it.

    Several processes, also of several machines, may call this at once: one measures and the others wait for its file.
    What it has measured is kept if it is killed. Samples that were rejected for an image file which has changed since
    then are measured again, likewise by one process.

    Args:
        source: the samples to measure.
        tokenizer: determines the lengths of text.
        geometry: determines the lengths of images.
        cache_dir: folder of cached indexes; default: `.lengths` in the folder of the annotations or beside the shards.
        processes: number of processes that measure; default: one per core, fewer for a small source.
        verify_images: decode every image, instead of its header alone.

    Raises:
        DataError: the cache folder cannot be written, or a measuring process died.
    """
    measurer = _Measurer(source, tokenizer, geometry, verify_images)
    path = cache_folder(source.location, cache_dir) / f"{Path(source.location).stem}-{measurer.cache_key()}.arrays"
    index = _read(path)
    if index is None or _stale(index):
        index = _measure_once(measurer, path, processes)
    index.file = path
    return index


def _stale(index: LengthIndex) -> list[int]:
    """The rejected samples to measure again."""
    return [rejection.index for rejection in index.rejected if rejection.is_stale]


def _measure_once(measurer: _Measurer, path: Path, processes: int | None) -> LengthIndex:
    """Measure all samples, or the rejected ones again, and write the file, or wait for another process that does so."""
    lock = path.with_suffix(".lock")
    with _writing_to(path.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with file_lock(lock, purpose=f"measuring {measurer.source.name}"):
        index = _read(path)
        if index is None:
            parts = PartialFiles(path.with_suffix(".partial"))
            index = _measure_all(measurer, parts, processes)
            _write(path, index)
            parts.remove()
        elif stale := _stale(index):
            label = f"measuring rejected samples of {measurer.source.name} again"
            measured = parallel_map(lambda i: measurer.measure(stale[i]), len(stale), processes, label)
            index = _update(index, dict(zip(stale, measured, strict=True)))
            _write(path, index)
    return index


def _measure_all(measurer: _Measurer, parts: PartialFiles, processes: int | None) -> LengthIndex:
    """Measure what is not in `parts` yet, and keep it there while measuring."""
    measured = [_from_arrays(arrays) for arrays in parts.read()]
    done = before = sum(len(part.tokens) for part in measured)
    total, label = len(measurer.source), f"measuring {measurer.source.name}"
    samples = parallel_map(
        lambda index: measurer.measure(before + index), total - before, processes, label, samples_before=before
    )
    for batch, more in timed_batches(samples, _PART_SECONDS):
        part = _collect(iter(batch), len(batch))
        measured.append(part)
        if more:  # after the last batch, the whole index is written
            with _writing_to(parts.folder.parent):
                parts.write(done, done + len(batch), _to_arrays(part))
        done += len(batch)
    return _concatenate(measured)


def _collect(samples: Iterator[_SampleLengths], total: int) -> LengthIndex:
    tokens, tiles = np.empty(total, np.int32), np.empty(total, np.int32)
    counts = np.zeros(total + 1, np.int64)
    sizes = array("i")  # not a list, which would take gigabytes for millions of samples
    rejected = []
    for index, lengths in enumerate(samples):
        tokens[index], tiles[index] = lengths.tokens, lengths.tiles
        counts[index + 1] = len(lengths.sizes)
        for size in lengths.sizes:
            sizes.extend(size)
        if lengths.rejection:
            rejected.append(lengths.rejection)
    return LengthIndex(tokens, tiles, np.cumsum(counts), np.frombuffer(sizes, np.int32).reshape(-1, 2), rejected)


def _update(index: LengthIndex, remeasured: dict[int, _SampleLengths]) -> LengthIndex:
    """The index with new lengths of some samples that were rejected. Those had no image sizes."""
    tokens, tiles, counts = index.tokens.copy(), index.tiles.copy(), np.diff(index.size_starts)
    usable = {i: lengths for i, lengths in sorted(remeasured.items()) if lengths.rejection is None}
    for i, lengths in usable.items():
        tokens[i], tiles[i], counts[i] = lengths.tokens, lengths.tiles, len(lengths.sizes)
    rows = [int(index.size_starts[i]) for i, lengths in usable.items() for _ in lengths.sizes]
    new = np.array([size for lengths in usable.values() for size in lengths.sizes], np.int32).reshape(-1, 2)
    sizes = np.insert(index.sizes, rows, new, axis=0) if rows else index.sizes
    after = [remeasured[old.index].rejection if old.index in remeasured else old for old in index.rejected]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return LengthIndex(tokens, tiles, starts, sizes, [rejection for rejection in after if rejection is not None])


def _concatenate(parts: list[LengthIndex]) -> LengthIndex:
    counts = np.concatenate([np.diff(part.size_starts) for part in parts])
    return LengthIndex(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.tiles for part in parts]),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.concatenate([part.sizes for part in parts]),
        [rejection for part in parts for rejection in part.rejected],
    )


def _to_arrays(index: LengthIndex) -> dict[str, np.ndarray]:
    rejected = [asdict(rejection) for rejection in index.rejected]
    arrays = {name: getattr(index, name) for name in ("tokens", "tiles", "size_starts", "sizes")}
    return {**arrays, _REJECTIONS: np.frombuffer(json.dumps(rejected).encode(), np.uint8)}


def _from_arrays(arrays: dict[str, np.ndarray]) -> LengthIndex:
    """Raises KeyError or ValueError if they are not of a length index."""
    rejected = [Rejection(**item) for item in json.loads(arrays[_REJECTIONS].tobytes())]
    return LengthIndex(arrays["tokens"], arrays["tiles"], arrays["size_starts"], arrays["sizes"], rejected)


def _file_state(path: str | Path) -> list[int]:
    """[size, modification time in ns] of a file, or [] if it cannot be accessed."""
    try:
        return [int(number) for number in file_state(os.stat(path))]
    except (OSError, ValueError):  # a name with NUL or a lone surrogate is no file name
        return []


def _read(path: Path) -> LengthIndex | None:
    try:
        return _from_arrays(map_arrays(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("length index %s is damaged (%s) and is rebuilt", path, error)
        return None


def _write(path: Path, index: LengthIndex) -> None:
    with _writing_to(path.parent):
        with atomic_file(path.with_suffix(_REJECTED_SUFFIX)) as file:
            for rejection in index.rejected:
                listed = {name: value for name, value in vars(rejection).items() if name != "image_files"}
                file.write(f"{json.dumps(listed)}\n".encode())
        write_arrays(path, **_to_arrays(index))


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the length index cannot be written to {folder}: {error}. Set cache_dir to a writable folder."
        ) from error


def describe_rejections(source: SampleSource, index: LengthIndex) -> list[str]:
    """Log lines: how many samples were rejected for each reason, with an example of each; none if no sample was."""
    if not index.rejected:
        return []
    counts = Counter(rejection.reason for rejection in index.rejected).most_common()
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
    examples = [
        next(rejection.message for rejection in index.rejected if rejection.reason == reason) for reason, _ in counts
    ]
    return [
        f"{source.name}: {len(index.rejected)} of {len(index.tokens)} samples rejected: {reasons}; "
        f"all are listed in {index.rejected_file}. Examples:",
        *examples,
    ]
