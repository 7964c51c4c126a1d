"""Builds the batch of a planned row: reads, encodes and packs its samples, and decodes the images of this rank's tiles.

Every image was decoded once, when its shard was written or its lengths were measured, and rejected if that failed. So
an image that cannot be decoded now was damaged or replaced since then. This ends the run with an error that names the
image. It is not replaced by another: only first-stage ranks decode, the ranks that hold the labels do not, so the
substitution would go unnoticed. Once the file is fixed, the run resumes from its last checkpoint with exactly the
remaining rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.errors import DataError, RowError
from megatron_vlm.data.length_index import LengthIndex
from megatron_vlm.data.packing.row_plan import PlannedRow
from megatron_vlm.data.processing.conversation import encode_conversation
from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles_into, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.rows.batch import Document, PackedBatch, assemble_row, tile_range
from megatron_vlm.data.sources.annotations import count_placeholders
from megatron_vlm.data.sources.sample_source import Sample, SourceList


@dataclass
class RowBuilder:
    """Builds the batches of one rank."""

    sources: SourceList
    indexes: list[LengthIndex]
    """One per source."""
    tokenizer: Tokenizer
    geometry: ImageGeometry
    image_token_index: int
    seq_length: int
    tile_shard: tuple[int, int] | None
    """(rank, size) among the ranks that encode a row's tiles; None: this rank decodes no image."""
    truncations: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(turns kept, their tokens) of each truncated sample, by global sample number."""

    def build(self, row: PlannedRow) -> PackedBatch:
        """
        Raises:
            RowError: a sample cannot be read, or has changed since its lengths were measured.
        """
        samples, documents = [], []
        for number in row.members.tolist():
            sample, document = self._read(row, number)
            samples.append(sample)
            documents.append(document)
        batch = assemble_row(documents, self.seq_length, self.tokenizer.pad_id, self.geometry)
        batch.row_index = row.row_index
        if self.tile_shard is not None:
            batch.tiles = self._read_tiles(row, samples, documents, *tile_range(batch.num_tiles, *self.tile_shard))
        return batch

    def _read(self, row: PlannedRow, number: int) -> tuple[Sample, Document]:
        source_index, index = self.sources.locate(number)
        source, lengths = self.sources.sources[source_index], self.indexes[source_index]
        try:
            sample = source.sample(index)
        except (DataError, OSError) as error:
            raise RowError(
                f"row {row.row_index}: sample {index} of {source.name} can no longer be read: {error}"
            ) from error
        turns, sizes, expected = sample.turns, lengths.image_sizes(index), int(lengths.tokens[index])
        num_images = len(sizes)
        geometry = self.geometry.for_sample(num_images)
        if number in self.truncations:
            turns_kept, expected = self.truncations[number]
            turns = turns[:turns_kept]
            sizes = sizes[: count_placeholders(turns)]
        image_lengths = [num_image_tokens(size, geometry) for size in sizes]
        encoded = encode_conversation(turns, self.tokenizer, image_lengths, self.image_token_index)
        if len(encoded.ids) != expected:
            raise RowError(
                f"row {row.row_index}: sample {sample.id!r} of {sample.file} has {len(encoded.ids)} tokens, but "
                f"{expected} when it was measured: the data changed. Start the run again from its checkpoint."
            )
        return sample, Document(sample.id, encoded, sizes, source_index, num_images)

    def _read_tiles(
        self, row: PlannedRow, samples: Sequence[Sample], documents: Sequence[Document], start: int, stop: int
    ) -> torch.Tensor:
        """Tiles [start, stop) of the row, [n, 3, P, P] uint8. Images outside of this range are not read."""
        side = self.geometry.tile_size
        pixels = np.empty((stop - start, 3, side, side), np.uint8)  # not torch.empty: numpy asks for huge pages
        first = 0
        for sample, document in zip(samples, documents, strict=True):
            geometry = self.geometry.for_sample(max(document.num_images, len(document.image_sizes)))
            for i, size in enumerate(document.image_sizes):
                last = first + num_image_tiles(size, geometry)
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    image = self._decode(row, sample, i, size)
                    extract_tiles_into(pixels[begin - start : end - start], image, geometry, begin - first)
                first = last
        return torch.from_numpy(pixels)

    def _decode(self, row: PlannedRow, sample: Sample, i: int, size: tuple[int, int]) -> Image.Image:
        name = f"row {row.row_index}: sample {sample.id!r} of {sample.file}: image {sample.image_names[i]}"
        try:
            image = decode_image(sample.read_image(i))
        except (OSError, ImageUnreadable) as error:
            raise RowError(
                f"{name} was readable when the data was measured and no longer is: {error}. "
                "Restore the image and start the run again from its checkpoint."
            ) from error
        if image.size != size:
            index_file = next(
                index.file
                for source, index in zip(self.sources.sources, self.indexes, strict=True)
                if source.name == sample.file
            )
            raise RowError(
                f"{name} is {image.width}x{image.height} pixels, but was {size[0]}x{size[1]} when the data was "
                "measured. Restore the image, save the new one under another name, or remove "
                f"{index_file} to measure all samples again."
            )
        return image
