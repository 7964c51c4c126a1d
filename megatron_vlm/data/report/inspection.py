"""Samples as the model sees them, and suspicious samples: for show-sample and data-report."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.config import Recipe
from megatron_vlm.data.dataset import max_sample_tokens, open_sources
from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.length_index import REJECTED, LengthIndex
from megatron_vlm.data.processing.chat_template import TemplateError
from megatron_vlm.data.processing.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles, select_best_resolution
from megatron_vlm.data.report.scripts import ScriptCounts, count_scripts
from megatron_vlm.data.sources.annotations import count_placeholders
from megatron_vlm.data.sources.sample_source import Sample
from megatron_vlm.data.truncation import Truncations, load_truncations
from megatron_vlm.data.worker_pool import parallel_map


@dataclass
class ImageView:
    """One image of a sample."""

    name: str
    size: Size
    """Upright (width, height), pixels."""
    grid: Size
    """(columns, rows) of tiles without the base view; (0, 0): the base view only."""
    tiles: int
    start: int
    """Position of its first token in the sample."""
    num_tokens: int


@dataclass
class Span:
    """A run of tokens of the same kind."""

    kind: str
    """prompt: no loss; answer: supervised; image: image tokens"""
    start: int
    stop: int
    text: str
    """Decoded text with special tokens; empty for an image."""


@dataclass
class SampleView:
    """One sample as the model sees it."""

    number: int
    """Global sample number in the recipe's data."""
    sample: Sample
    encoded: EncodedConversation
    images: list[ImageView]
    spans: list[Span]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable values. `labels` are not shifted, `positions` are position ids.

        `positions` of an image is the older name of its `num_tokens`.
        """
        return {
            "number": self.number,
            "id": self.sample.id,
            "file": self.sample.file,
            "conversation": [turn._asdict() for turn in self.sample.turns],
            "images": [{**vars(image), "positions": image.num_tokens} for image in self.images],
            "spans": [vars(span) for span in self.spans],
            "ids": self.encoded.ids.tolist(),
            "labels": self.encoded.labels.tolist(),
            "positions": list(range(len(self.encoded.ids))),
        }


class DataView:
    """The data of a recipe, opened for inspection. Rejected and oversized samples are included."""

    def __init__(self, recipe: Recipe) -> None:
        """
        Raises:
            DataError: a source or the tokenizer cannot be opened.
        """
        self.recipe = recipe
        self._opened = open_sources(recipe)
        self.mixture, self.geometry = self._opened.mixture, self._opened.geometry
        self.tokenizer = self._opened.tokenizer

    def indexes(self) -> list[LengthIndex]:
        """One for each source; samples that are not in the cache are measured now."""
        return self._opened.load_indexes(self.recipe.data)

    def truncations(self, indexes: list[LengthIndex]) -> list[Truncations]:
        """How the samples of each source that are longer than a row are truncated, whatever oversized_samples is."""
        limits = max_sample_tokens(self.recipe), self.recipe.data.max_tiles_per_row
        return [
            load_truncations(source, index, self.tokenizer, self.geometry, *limits)
            for source, index in zip(self.mixture.sources.sources, indexes, strict=True)
        ]

    def find(self, sample_id: str) -> int | None:
        """Global sample number of the first sample with this id; None: there is none."""
        for number in range(len(self.mixture.sources)):
            source, index = self.mixture.sources.locate(number)
            try:
                if self.mixture.sources.sources[source].metadata(index).id == sample_id:
                    return number
            except SampleError as error:
                if error.sample_id == sample_id:
                    return number
        return None

    def view(self, number: int, turns_kept: int | None = None) -> SampleView:
        """Sample `number`, or its first `turns_kept` turns. Its images are decoded.

        Raises:
            SampleError: the sample is rejected.
        """
        sample = self.mixture.sources.sample(number)
        sizes = sample.measure_images()
        geometry = self.geometry.for_sample(len(sizes))  # that of the whole sample, as in training
        turns = sample.turns[:turns_kept]
        sizes = sizes[: count_placeholders(turns)]
        counts = [num_image_tokens(size, geometry) for size in sizes]
        image_token = self.recipe.model.image_token_index
        try:
            encoded = encode_conversation(turns, self.tokenizer, counts, image_token)
        except TemplateError as error:
            remedy = "Change the conversation, or set chat_template."
            raise SampleError(sample.id, sample.file, "chat template", str(error), remedy) from error
        images = [
            ImageView(name, size, grid_of(size, geometry), num_image_tiles(size, geometry), start, count)
            for name, size, start, count in zip(
                sample.image_names[: len(sizes)], sizes, encoded.image_starts, counts, strict=True
            )
        ]
        return SampleView(number, sample, encoded, images, list(self._spans(encoded, image_token)))

    def _spans(self, encoded: EncodedConversation, image_token: int) -> Iterator[Span]:
        is_image, is_answer = encoded.ids == image_token, encoded.labels != IGNORE_INDEX
        kinds = np.where(is_image, 2, np.where(is_answer, 1, 0))
        starts = np.union1d(np.flatnonzero(np.diff(kinds)) + 1, [0, *encoded.image_starts]).tolist()
        for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True):
            kind = ("prompt", "answer", "image")[kinds[start]]
            ids = encoded.ids[start:stop].tolist()
            text = "" if kind == "image" else self.tokenizer.decode(ids, skip_special_tokens=False)
            yield Span(kind, int(start), int(stop), text)


def grid_of(size: Size, geometry: ImageGeometry) -> Size:
    """(columns, rows) of tiles of an image of `size` (width, height); (0, 0): the base view only."""
    if num_image_tiles(size, geometry) == 1:
        return 0, 0
    width, height = select_best_resolution(size, geometry.pinpoints)
    return width // geometry.tile_size, height // geometry.tile_size


@dataclass
class Suspect:
    """A sample that a person should check."""

    source: str
    index: int
    sample_id: str
    reason: str
    message: str


_MIN_SIDE, _MAX_ASPECT_RATIO = 8, 20


def read_samples(
    view: DataView, indexes: list[LengthIndex], processes: int | None = None
) -> tuple[list[Suspect], list[ScriptCounts]]:
    """Suspicious samples, and the scripts of each source's usable samples. Annotations are read, images are not.

    Suspicious are rejected samples, samples longer than a row, images of unusual size or aspect ratio, and duplicates.

    Args:
        view: the data.
        indexes: the length index of each source.
        processes: number of processes that read annotations; default: one per core.
    """
    data = view.recipe.data
    found: list[Suspect] = []
    scripts: list[ScriptCounts] = []
    first: dict[bytes, str] = {}
    for source, index in zip(view.mixture.sources.sources, indexes, strict=True):
        found += [Suspect(source.name, r.index, r.sample_id, r.reason, r.message) for r in index.rejected]
        problems: dict[int, list[tuple[str, str]]] = defaultdict(list)
        oversized = (index.tokens > max_sample_tokens(view.recipe)) | (index.tiles > data.max_tiles_per_row)
        for sample in np.flatnonzero(oversized).tolist():
            message = f"{index.tokens[sample]} tokens, {index.tiles[sample]} tiles"
            problems[sample].append(("longer than a row", message))
        if len(index.sizes):
            shortest, longest = index.sizes.min(axis=1), index.sizes.max(axis=1)
            unusual = (shortest < _MIN_SIDE) | (longest > _MAX_ASPECT_RATIO * shortest)
            for image in np.flatnonzero(unusual).tolist():
                sample = int(np.searchsorted(index.size_starts, image, side="right")) - 1
                width, height = index.sizes[image].tolist()
                problems[sample].append(("odd image size", f"{width}x{height} pixels"))
        for sample, of_sample in problems.items():
            name = source.metadata(sample).id
            found += [Suspect(source.name, sample, name, reason, message) for reason, message in of_sample]
        scripts.append(ScriptCounts())
        digests = parallel_map(_Digest(source), len(source), processes, f"reading the texts of {source.name}")
        for sample, (digest, name, letters) in enumerate(digests):
            if index.tokens[sample] == REJECTED or not digest:
                continue
            scripts[-1].add(letters)
            if digest in first:
                found.append(Suspect(source.name, sample, name, "duplicate", f"the same as {first[digest]}"))
            else:
                first[digest] = f"{name!r}, sample {sample} of {source.name}"
    return found, scripts


class _Digest:
    """(hash of conversation and image names, id, letters by script) of a sample; an empty hash for a rejected one."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __call__(self, index: int) -> tuple[bytes, str, Counter[str]]:
        try:
            sample = self._source.metadata(index)
        except SampleError as error:
            return b"", error.sample_id, Counter()
        content = json.dumps([sample.turns, sample.image_names]).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=12).digest(), sample.id, count_scripts(sample.turns)
