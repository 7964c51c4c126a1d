"""Samples as the model sees them, and numbers over all samples: for show-sample and data-report."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.config import Recipe
from megatron_vlm.data.dataset import open_sources
from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.length_index import REJECTED, LengthIndex
from megatron_vlm.data.processing.conversation import IGNORE_INDEX, EncodedConversation, encode_conversation
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, Size, num_image_tiles, select_best_resolution
from megatron_vlm.data.sources.sample_source import Sample
from megatron_vlm.data.worker_pool import parallel_map


@dataclass
class ImageView:
    """One image of a sample."""

    name: str
    size: Size
    """Upright (width, height), pixels."""
    grid: Size
    """(columns, rows) of tiles, the base view not counted; (0, 0) where there is the base view alone."""
    tiles: int
    start: int
    """Of its first position."""
    positions: int


@dataclass
class Span:
    """Positions in a row that are alike."""

    kind: str
    """prompt: read only; answer: learned; image"""
    start: int
    stop: int
    text: str
    """Special ids spelled out; of an image nothing."""


@dataclass
class SampleView:
    """One sample as the model sees it."""

    number: int
    """Among all samples of the recipe's data."""
    sample: Sample
    encoded: EncodedConversation
    images: list[ImageView]
    spans: list[Span]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON. `labels` are not shifted, `positions` restart at 0 in each document."""
        return {
            "number": self.number,
            "id": self.sample.id,
            "file": self.sample.file,
            "conversation": [turn._asdict() for turn in self.sample.turns],
            "images": [vars(image) for image in self.images],
            "spans": [vars(span) for span in self.spans],
            "ids": self.encoded.ids.tolist(),
            "labels": self.encoded.labels.tolist(),
            "positions": list(range(len(self.encoded.ids))),
        }


class DataView:
    """The data of a recipe, opened to be looked at."""

    def __init__(self, recipe: Recipe) -> None:
        """
        Raises:
            DataError: something of the data cannot be opened.
        """
        self.recipe = recipe
        self._opened = open_sources(recipe)
        self.mixture, self.geometry = self._opened.mixture, self._opened.geometry
        self.tokenizer = self._opened.tokenizer

    def indexes(self) -> list[LengthIndex]:
        """One for each source; samples that are not in the cache are measured now."""
        return self._opened.load_indexes(self.recipe.data.cache_dir)

    def find(self, sample_id: str) -> int | None:
        """The number of the first sample with this id."""
        for number in range(len(self.mixture.sources)):
            place, index = self.mixture.sources.locate(number)
            try:
                if self.mixture.sources.sources[place].metadata(index).id == sample_id:
                    return number
            except SampleError as error:
                if error.sample_id == sample_id:
                    return number
        return None

    def view(self, number: int) -> SampleView:
        """One sample; its images are decoded.

        Raises:
            SampleError: it would be refused.
        """
        sample = self.mixture.sources.sample(number)
        sizes = sample.measure_images()
        positions = [num_image_tokens(size, self.geometry) for size in sizes]
        image_token = self.recipe.model.image_token_index
        encoded = encode_conversation(sample.turns, self.tokenizer, positions, image_token)
        images = [
            ImageView(name, size, grid_of(size, self.geometry), num_image_tiles(size, self.geometry), start, count)
            for name, size, start, count in zip(sample.image_names, sizes, encoded.image_starts, positions, strict=True)
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
    """(columns, rows) of tiles that an image of `size` (width, height) is cut into."""
    if num_image_tiles(size, geometry) == 1:
        return 0, 0
    width, height = select_best_resolution(size, geometry.pinpoints)
    return width // geometry.tile_size, height // geometry.tile_size


@dataclass
class Suspect:
    """A sample that somebody should look at."""

    source: str
    index: int
    sample_id: str
    reason: str
    message: str


_TINY, _NARROW = 8, 20


def find_suspects(view: DataView, indexes: list[LengthIndex], processes: int | None = None) -> list[Suspect]:
    """Refused samples, samples longer than a row, images of odd shapes, and samples that are there more than once.

    Args:
        view: the data.
        indexes: its lengths.
        processes: that read annotations.
    """
    data = view.recipe.data
    found: list[Suspect] = []
    first: dict[bytes, str] = {}
    for source, index in zip(view.mixture.sources.sources, indexes, strict=True):
        found += [Suspect(source.name, r.index, r.sample_id, r.reason, r.message) for r in index.rejected]
        odd: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for place in np.flatnonzero((index.tokens > data.seq_length) | (index.tiles > data.max_tiles_per_row)).tolist():
            told = f"{index.tokens[place]} tokens, {index.tiles[place]} tiles"
            odd[place].append(("longer than a row", told))
        if len(index.sizes):
            narrow = index.sizes.max(axis=1) > _NARROW * index.sizes.min(axis=1)
            for row in np.flatnonzero(narrow | (index.sizes.min(axis=1) < _TINY)).tolist():
                place = int(np.searchsorted(index.size_starts, row, side="right")) - 1
                width, height = index.sizes[row].tolist()
                odd[place].append(("odd image size", f"{width}x{height} pixels"))
        for place, told_of in odd.items():
            name = source.metadata(place).id
            found += [Suspect(source.name, place, name, reason, message) for reason, message in told_of]
        digests = parallel_map(_Digest(source), len(source), processes, f"looking for duplicates in {source.name}")
        for place, (digest, name) in enumerate(digests):
            if index.tokens[place] == REJECTED or not digest:
                continue
            if digest in first:
                found.append(Suspect(source.name, place, name, "duplicate", f"the same as {first[digest]}"))
            else:
                first[digest] = f"{name!r}, sample {place} of {source.name}"
    return found


class _Digest:
    """Of what a sample says: conversation and image names."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __call__(self, index: int) -> tuple[bytes, str]:
        try:
            sample = self._source.metadata(index)
        except SampleError as error:
            return b"", error.sample_id
        content = json.dumps([sample.turns, sample.image_names]).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=12).digest(), sample.id
